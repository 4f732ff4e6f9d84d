"""What a streamed calibration keeps on disk until it is done, so that a kill loses one layer at most.

Beside the target, in ``<target>.partial``:

    run.json                      what the run is of; another run is not continued
    hidden-<n>.bin                the hidden states that go into layer n, batch after batch
    layer-<n>.safetensors         the statistics of layer n, complete

A file appears as a whole. The input of a layer is removed only once the layer's statistics and its output are there.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from collegium.errors import ConfigError, StatisticsError
from collegium.files import PARTIAL, atomic_file

__all__ = ["PartialRun"]

_RUN = "run.json"
_HIDDEN, _LAYER = "hidden-{:05d}.bin", "layer-{:05d}.safetensors"


class PartialRun:
    """The folder of an unfinished run.

    Attributes:
        folder: where it is.
        first: the first layer that is still to run, or None before the embeddings were taken.

    Args:
        target: the folder the statistics will go to.
        run: what the run is of, as plain JSON data.
        layers: the layers that give statistics.
        resume: continue what is there; else it is deleted.

    Raises:
        ConfigError: what is there is of another run.
        StatisticsError: what is there is damaged.
    """

    def __init__(self, target: Path, run: dict[str, Any], layers: Sequence[int], *, resume: bool) -> None:
        self.folder = target.with_name(f"{target.name}.partial")
        self.first: int | None = None
        if self._is_foreign():
            raise ConfigError(f"{self.folder} is not an unfinished calibration; move it away, or choose another target")
        if not resume:
            self.remove()
        if self._continues(run):
            self.first = self._find_first(layers)
            self._drop_inputs(self.first)
            return
        with atomic_file(self.folder / _RUN) as path:
            path.write_text(json.dumps(run, indent=1), encoding="utf-8")

    def _is_foreign(self) -> bool:
        """Whether the folder holds something that no run wrote."""
        if not self.folder.exists() or (self.folder / _RUN).is_file():
            return False
        return not self.folder.is_dir() or any(not file.name.startswith(PARTIAL) for file in self.folder.iterdir())

    def _continues(self, run: dict[str, Any]) -> bool:
        """Whether there is something to go on with. What is left of another run goes if no layer of it was done."""
        path = self.folder / _RUN
        if not path.exists():
            return False
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise StatisticsError(f"{path} is not readable: {error}; start again with --fresh") from error
        run = json.loads(json.dumps(run))
        if stored == run:
            return True
        if any(self.folder.glob("layer-*.safetensors")):
            other = [key for key in run if not isinstance(stored, dict) or stored.get(key) != run[key]]
            raise ConfigError(
                f"{self.folder} is what is left of another run (it differs in {', '.join(other) or 'its form'}); "
                "repeat that run to continue it, or start again with --fresh"
            )
        self.remove()
        return False

    def _find_first(self, layers: Sequence[int]) -> int | None:
        finished = {layer for layer in layers if self._layer(layer).exists()}
        if finished.issuperset(layers):
            return layers[-1] + 1
        ready = [number for number in self._inputs() if all(layer in finished for layer in layers if layer < number)]
        if finished and not ready:
            raise StatisticsError(
                f"{self.folder} has statistics of layers {sorted(finished)} but not the hidden states to go on from; "
                "start again with --fresh"
            )
        return ready[-1] if ready else None

    def _drop_inputs(self, first: int | None) -> None:
        """Delete hidden states that a kill kept from being deleted."""
        for number in self._inputs():
            if first is not None and number < first:
                self._hidden(number).unlink()

    def _inputs(self) -> list[int]:
        """Layers whose input is there, ascending."""
        found = (re.fullmatch(r"hidden-(\d+)\.bin", file.name) for file in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _hidden(self, layer: int) -> Path:
        return self.folder / _HIDDEN.format(layer)

    def _layer(self, layer: int) -> Path:
        return self.folder / _LAYER.format(layer)

    @contextmanager
    def write_hidden(self, layer: int) -> Iterator[Callable[[Tensor], None]]:
        """Yield what takes the hidden states that go into `layer`, batch after batch.

        Raises:
            StorageError: the disk is full.
        """
        with atomic_file(self._hidden(layer)) as path, open(path, "wb") as file:

            def write(hidden: Tensor) -> None:
                file.write(_bytes(hidden.contiguous()))

            yield write

    def read_hidden(self, layer: int, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Iterator[Tensor]:
        """The hidden states that go into `layer`, batch after batch.

        Raises:
            StatisticsError: the file is too short or too long.
        """
        path = self._hidden(layer)
        with open(path, "rb") as file:
            for shape in shapes:
                hidden = torch.empty(*shape, dtype=dtype)
                if file.readinto(_bytes(hidden)) != hidden.nbytes:
                    raise StatisticsError(f"{path} is shorter than the calibration data; start again with --fresh")
                yield hidden
            if file.read(1):
                raise StatisticsError(f"{path} is longer than the calibration data; start again with --fresh")

    def finish_layer(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Store the statistics of a layer, none for a dense one, and drop what went into it.

        Its output must be there already.
        """
        if tensors:
            with atomic_file(self._layer(layer)) as path:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        self._hidden(layer).unlink(missing_ok=True)

    def statistics(self, layers: Sequence[int]) -> dict[tuple[int, str], Tensor]:
        """``(layer, name) -> tensor`` of all layers.

        Raises:
            StatisticsError: a file is damaged.
        """
        found: dict[tuple[int, str], Tensor] = {}
        for layer in layers:
            try:
                tensors = load_file(self._layer(layer))
            except Exception as error:  # foreign bytes; what their parser raises is not ours to list
                raise StatisticsError(
                    f"{self._layer(layer)} is not readable: {error}; start again with --fresh"
                ) from error
            found |= {(layer, name): tensor for name, tensor in tensors.items()}
        return found

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
