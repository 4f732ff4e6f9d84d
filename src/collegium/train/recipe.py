"""`Recipe`: everything that decides a training run, read from YAML; unknown names and bad values are refused by name.

recipe = Recipe.load("recipes/tiny.yaml", ["optim.lr=1e-3", "moe.num_experts=8"])
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from collegium.errors import ConfigError
from collegium.models import MoEConfig
from collegium.train.objectives import as_said

__all__ = ["DataSpec", "ModelSpec", "OptimSpec", "Recipe", "RunSpec", "ScheduleSpec"]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSpec(_Spec):
    """The dense causal LM that carries the MoE layers: either built from scratch or read from a folder.

    Attributes:
        checkpoint: a model folder to start from; then nothing else of this section may be given.
        family: transformers' ``model_type``, for example "qwen3" or "llama".
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
            tie_word_embeddings: as in transformers' configs.
        config: any other setting of the family's config class.
    """

    checkpoint: Path | None = None
    family: str | None = None
    hidden_size: int | None = Field(default=None, gt=0)
    intermediate_size: int | None = Field(default=None, gt=0)
    num_hidden_layers: int | None = Field(default=None, gt=0)
    num_attention_heads: int | None = Field(default=None, gt=0)
    num_key_value_heads: int | None = Field(default=None, gt=0)
    head_dim: int | None = Field(default=None, gt=0)
    tie_word_embeddings: bool | None = None
    config: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        given = self.settings()
        if self.checkpoint is not None and (self.family or given):
            extra = ["family"] * bool(self.family) + list(given)
            raise ValueError(f"with a checkpoint, {', '.join(extra)} must not be given: the checkpoint decides")
        if self.checkpoint is None:
            needed = ("family", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
            if missing := [name for name in needed if getattr(self, name) is None]:
                raise ValueError(f"without a checkpoint it needs {', '.join(missing)}")
        return self

    def settings(self) -> dict[str, Any]:
        """The config settings that were given, as keyword arguments of the family's config class."""
        named = self.model_dump(exclude={"checkpoint", "family", "config"}, exclude_none=True)
        return {**named, **self.config}


class DataSpec(_Spec):
    """What is read.

    Attributes:
        corpus: "local", a folder or a file; see `collegium.data.open_corpus`. `options` go with it.
        tokenizer: a tokenizer folder; None trains one of `vocab_size` tokens on the corpus (or, with
            ``model.checkpoint``, takes the checkpoint's).
        sequence_length: tokens in a sequence.
        mask_documents: True confines attention to the document and restarts positions with it; False lets a packed
            sequence attend across document borders with positions running on (no mask: a few per cent faster).
        cache: where tokenizers and packed sequences are kept between runs.
    """

    corpus: str = "local"
    options: dict[str, Any] = Field(default_factory=dict)
    tokenizer: Path | None = None
    vocab_size: int = Field(default=4096, gt=256)
    sequence_length: int = Field(default=256, gt=1)
    mask_documents: bool = True
    cache: Path = Path("~/.cache/collegium")


class OptimSpec(_Spec):
    """AdamW. Weight decay acts on matrices only; routers, norms and biases are left out. `clip` 0 turns it off."""

    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, ge=0)


class ScheduleSpec(_Spec):
    """Learning rate over the run, as fractions of its steps.

    Attributes:
        name: a method of kind "schedule".
        warmup: fraction of the run that rises linearly from 0.
        decay: fraction of the run that falls at the end ("wsd" only).
        final: last learning rate as a fraction of ``optim.lr``.
    """

    name: str = "cosine"
    warmup: float = Field(default=0.02, ge=0, lt=1)
    decay: float = Field(default=0.2, ge=0, le=1)
    final: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> ScheduleSpec:
        if self.name == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} together exceed the run")
        return self


class RunSpec(_Spec):
    """How long, how large, how often.

    Attributes:
        steps, tokens: length of the run; exactly one is given.
        batch_size: sequences per optimizer step over all processes.
        accumulate: micro-batches each process splits its share into.
        fuse: norms and attention by kernels of our own, equal within rounding, where they apply (a CPU in float32,
            families that they know); False leaves transformers' own.
        compile: fuse what surrounds the FFNs (attention, norms) with torch.compile; needs a C++ compiler on a CPU. It
            takes the place of `fuse`.
        precision: "bfloat16" runs under autocast; parameters and optimizer state stay float32.
        save_dtype: of the final model; the final evaluation is of the weights as saved.
        log_every, eval_every, checkpoint_every: in steps; 0 never (evaluation and saving at the end always happen).
        eval_sequences: sequences per domain in the evaluations on the way; the one at the end takes all.
        keep_checkpoints: how many are kept; 0 keeps all.
        loggers: besides the metrics file.
    """

    seed: int = 0
    steps: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=32, gt=0)
    accumulate: int = Field(default=1, gt=0)
    fuse: bool = True
    compile: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    log_every: int = Field(default=10, ge=0)
    eval_every: int = Field(default=0, ge=0)
    eval_sequences: int = Field(default=64, gt=0)
    checkpoint_every: int = Field(default=0, ge=0)
    keep_checkpoints: int = Field(default=2, ge=0)
    loggers: tuple[Literal["tensorboard", "trackio"], ...] = ()

    @model_validator(mode="after")
    def _one_length(self) -> RunSpec:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give either steps or tokens")
        return self


MAY_CHANGE = {
    f"run.{name}"
    for name in ("steps", "tokens", "log_every", "eval_every", "eval_sequences", "checkpoint_every", "keep_checkpoints",
                 "loggers", "save_dtype")
} | {"data.cache"}  # fmt: skip
"""What may differ when a run is resumed: its length, and what is written about it."""


class Recipe(_Spec):
    """One training run. ``moe: null`` (or no such section) trains the dense model itself.

    Attributes:
        objective: what a step minimises: a catalogued name, or one name with its settings, as
            ``{consistency: {alpha: 1.0}}``.
    """

    model: ModelSpec
    moe: MoEConfig | None = None
    data: DataSpec = DataSpec()
    optim: OptimSpec = OptimSpec()
    objective: str | dict[str, Any] = "next_token"
    schedule: ScheduleSpec = ScheduleSpec()
    run: RunSpec

    @field_validator("objective", mode="before")
    @classmethod
    def _known(cls, said: Any) -> str | dict[str, Any]:
        return as_said(said)

    @classmethod
    def load(cls, file: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a YAML file and apply dotted overrides such as ``optim.lr=1e-3`` (their values are YAML too).

        Raises:
            ConfigError: the file cannot be read, or a field is unknown or has a bad value; the message names it.
        """
        try:
            data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the recipe {file}: {error}") from error
        return cls.parse(data, overrides, where=str(file))

    @classmethod
    def parse(cls, data: Any, overrides: Iterable[str] | Mapping[str, Any] = (), where: str = "recipe") -> Recipe:
        """A recipe from plain data; overrides may be a mapping, too, ``{"optim.lr": 1e-3}``. Raises ConfigError like
        `load`; `where` begins its message."""
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: a recipe is a mapping with model, data, run, ...; this is {data!r}")
        data = copy.deepcopy(data)
        read = overrides.items() if isinstance(overrides, Mapping) else map(_read_override, overrides)
        for path, value in read:
            _assign(data, path, value)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = []
            for e in error.errors(include_url=False):
                field = ".".join(str(part) for part in e["loc"]) or "recipe"
                value = "" if isinstance(e["input"], dict) else f", got {e['input']!r}"
                problems.append(f"{field}: {e['msg'].removeprefix('Value error, ')}{value}")
            raise ConfigError(f"{where}: {'; '.join(problems)}") from error

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.run.steps is not None:
            return self.run.steps
        assert self.run.tokens is not None
        return -(-self.run.tokens // (self.run.batch_size * self.data.sequence_length))

    def plain(self) -> dict[str, Any]:
        """As plain data, for YAML and JSON."""
        return self.model_dump(mode="json", exclude_none=True)

    def dump(self) -> str:
        """As YAML; `parse` reads it back to an equal recipe."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)

    def differences(self, other: Recipe) -> list[str]:
        """``field: mine != theirs`` for every field that decides the result; run length and logging may differ."""
        mine, theirs = _flat(self.plain()), _flat(other.plain())
        fields = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return [f"{name}: {mine.get(name)} != {theirs.get(name)}" for name in fields if name not in MAY_CHANGE]


def _read_override(override: str) -> tuple[str, Any]:
    path, found, text = override.partition("=")
    if not found or not path.strip():
        raise ConfigError(f"cannot read the override {override!r}; write it as section.field=value")
    try:
        return path.strip(), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read the value of the override {override!r}: {error}") from error


def _assign(data: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    at = data
    for section in sections:
        if at.get(section) is None:
            at[section] = {}
        at = at[section]
        if not isinstance(at, dict):
            raise ConfigError(f"override of {path}: {section} is not a section but {at!r}")
    at[name] = value


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
