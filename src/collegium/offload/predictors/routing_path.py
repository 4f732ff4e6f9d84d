"""Routing path: a small causal encoder that reads token ids and names the experts of all layers at once (ExpertFlow).

It knows the path before the first MoE layer runs. The paper has a T5-style encoder and decoder; this one is an encoder
with causal attention, so that a prompt and one more token are read alike, and one linear head for each layer.

Legend: T tokens of a pass, B windows of W tokens, V known ids, d width, E experts of a layer, L layers.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from collegium._version import __version__
from collegium.catalog import method
from collegium.errors import CheckpointError, ConfigError
from collegium.files import atomic_dir, read_record
from collegium.named import settled
from collegium.offload.geometry import Array, Geometry
from collegium.offload.predictors.base import Gates, Moment, Prediction, Predictor
from collegium.offload.predictors.path_encoder import PathEncoder, train_encoder
from collegium.offload.predictors.rows import Fitted, Rows

if TYPE_CHECKING:
    from collegium.trace import Trace

__all__ = ["RoutingPath", "RoutingPathPredictor"]

META, TENSORS = "predictor.json", "predictor.safetensors"
_META_LIMIT = 1 << 20  # bytes
_TOP = 1 << 12  # of every size in the settings: what a file asks for is built before its tensors are read


@method("routing_path", kind="predictor", paper="ExpertFlow (2024)", arxiv="2410.17954")
@dataclass(frozen=True)
class RoutingPath(Fitted):
    """Trained on a trace by binary cross-entropy over all experts of all layers, or read from a folder.

    Attributes:
        folder: of a predictor that `RoutingPathPredictor.save` wrote; then nothing is trained.
        width: d.
        blocks: attention blocks.
        window: W, tokens that it sees at most.
        steps: of training, of 32 windows each.
        lr: peak of the learning rate.
        seed: of weights and batches.
    """

    folder: str | None = None
    width: int = 128
    blocks: int = 2
    window: int = 64
    steps: int = 600
    lr: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (("width", _TOP), ("blocks", 64), ("window", _TOP), ("steps", 1 << 30)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must be 1 to {most}, not {getattr(self, name)}")
        if self.width % 4:
            raise ConfigError(f"width must be a multiple of the 4 attention heads, not {self.width}")
        if not 0 < self.lr < 1:
            raise ConfigError(f"lr must be above 0 and below 1, not {self.lr}")

    @property
    def needs_trace(self) -> bool:
        return self.folder is None

    def build(self, geometry: Geometry, *, trace: Trace | None = None, gates: Gates | None = None) -> Predictor:
        """Raises CheckpointError where the folder holds no predictor, or one of another model."""
        if self.folder is not None:
            return RoutingPathPredictor.load(self.folder, geometry)
        return super().build(geometry, trace=trace, gates=gates)

    def fit(self, geometry: Geometry, rows: Rows) -> RoutingPathPredictor:
        encoder = PathEncoder(np.unique(rows.tokens), geometry.experts, self.width, self.blocks, self.window, self.seed)
        train_encoder(encoder, rows, steps=self.steps, lr=self.lr, seed=self.seed)
        return RoutingPathPredictor(geometry, encoder, self)


class RoutingPathPredictor(Predictor):
    """A trained encoder, and the tokens of the sequence so far."""

    def __init__(self, geometry: Geometry, encoder: PathEncoder, settings: RoutingPath) -> None:
        super().__init__(geometry)
        self.horizon = geometry.num_layers
        self._encoder, self._settings = encoder, settings
        self.begin()

    def begin(self) -> None:
        self._before = np.zeros(0, np.int64)
        self._pass: Array | None = None
        self._layer = -1
        self._scores: list[Array] = []

    def predict(self, moment: Moment) -> list[Prediction]:
        same = self._pass is not None and moment.layer > self._layer and np.array_equal(self._pass, moment.tokens)
        if not same:
            self._read(moment.tokens.astype(np.int64))
        self._layer = moment.layer
        return [Prediction(m, self._scores[m]) for m in range(moment.layer + 1, self.geometry.num_layers)]

    def _read(self, tokens: Array) -> None:
        """Score every layer for the tokens of a new pass."""
        if self._pass is not None:
            self._before = np.concatenate([self._before, self._pass])[-self._encoder.window :]
        self._pass = tokens
        rates = self._encoder.rates(self._before, tokens)
        self._scores = [part.sum(0) for part in np.split(rates, self.geometry.offsets[1:-1], axis=1)]

    def save(self, folder: str | os.PathLike[str], fingerprint: str | None = None) -> None:
        """Write it as safetensors and JSON, for `RoutingPath(folder=...)`.

        Args:
            fingerprint: of the model whose trace it was trained on.

        Raises:
            ConfigError: something else is in `folder`.
            StorageError: it cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / META).is_file():
            raise ConfigError(f"{folder} exists and holds no routing path predictor; choose another")
        settings = {name: value for name, value in asdict(self._settings).items() if name != "folder"}
        meta = _Meta(
            experts=self.geometry.experts, layers=self.geometry.layers, known_ids=len(self._encoder.ids),
            settings=settings, fingerprint=fingerprint, collegium=__version__,
        )  # fmt: skip
        with atomic_dir(folder) as partial:
            save_file({name: t.contiguous() for name, t in self._encoder.state_dict().items()}, partial / TENSORS)
            (partial / META).write_text(meta.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], geometry: Geometry) -> RoutingPathPredictor:
        """Read what `save` wrote. Nothing in the folder is trusted.

        Raises:
            CheckpointError: it is no such predictor, is damaged, or was trained for other layers or experts.
        """
        folder = Path(folder)
        meta = read_record(folder / META, _Meta, what="predictor", limit=_META_LIMIT, error=CheckpointError)
        if (meta.experts, meta.layers) != (geometry.experts, geometry.layers):
            raise CheckpointError(
                f"{folder} was trained for layers {meta.layers} with {meta.experts} experts; the model has layers "
                f"{geometry.layers} with {geometry.experts}"
            )
        try:
            settings: RoutingPath = settled(RoutingPath, meta.settings)
        except ConfigError as error:
            raise CheckpointError(f"{folder / META}: {error}") from error
        ids = np.zeros(meta.known_ids, np.int64)
        encoder = PathEncoder(ids, meta.experts, settings.width, settings.blocks, settings.window, settings.seed)
        try:
            encoder.load_state_dict(load_file(folder / TENSORS))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{folder / TENSORS} is not the predictor its {META} describes: {error}") from error
        odd = [name for name, tensor in encoder.state_dict().items() if not tensor.isfinite().all()]
        if odd or (encoder.ids.diff() <= 0).any():
            raise CheckpointError(f"{folder / TENSORS}: {odd[0] if odd else 'ids'} holds values that cannot be")
        return cls(geometry, encoder.eval(), settings)


class _Meta(BaseModel):
    """``predictor.json``: what the encoder was trained for, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1] = 1
    kind: Literal["routing_path"] = "routing_path"
    experts: tuple[int, ...]
    layers: tuple[int, ...]
    known_ids: int = Field(ge=0, le=1 << 24)
    settings: dict[str, int | float]
    fingerprint: str | None
    collegium: str
