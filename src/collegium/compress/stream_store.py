"""What a streamed calibration keeps on disk until it is done, so that a kill loses one layer at most.

Beside the target, in ``<target>.partial`` (``<target>.partial-<rank>-of-<world>`` under torchrun):

    run.json                      what the run is of; another run is not continued
    hidden-<n>.bin                the hidden states that go into layer n, batch after batch
    layer-<n>.safetensors         the statistics of layer n, complete
    gradient-<n>.bin              the loss's gradient with respect to those hidden states
    backward-<n>.safetensors      the statistics of layer n that need gradients, complete

A file appears as a whole. Without gradients the input of a layer is removed once the layer's statistics and its output
are there. With them the inputs of the layers from the first with experts on stay for the way back, and go then.
"""

from __future__ import annotations

import glob
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
_GRADIENT, _BACKWARD = "gradient-{:05d}.bin", "backward-{:05d}.safetensors"


class PartialRun:
    """The folder of an unfinished run, or of one process's part of it.

    Attributes:
        folder: where it is.
        first: the first layer that is still to run, or None before the embeddings were taken.
        reached: the layer that the gradient has come down to, or None before it has begun.

    Args:
        target: the folder the statistics will go to.
        run: what the run is of, as plain JSON data.
        layers: the layers that give statistics, ascending.
        resume: continue what is there; else it is deleted.
        top: how many layers there are, if gradients are wanted; None if not.
        rank, world: this process, among so many.

    Raises:
        ConfigError: what is there is of another run, or of another number of processes.
        StatisticsError: what is there is damaged.
    """

    def __init__(
        self,
        target: Path,
        run: dict[str, Any],
        layers: Sequence[int],
        *,
        resume: bool,
        top: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.folder = target.with_name(f"{target.name}.partial{'' if world == 1 else f'-{rank}-of-{world}'}")
        self.layers, self.top = layers, top
        self.first: int | None = None
        self.reached: int | None = None
        if self._is_foreign():
            raise ConfigError(f"{self.folder} is not an unfinished calibration; move it away, or choose another target")
        _refuse_others(target, world, resume)
        if not resume:
            self.remove()
        if self._continues(run):
            self.reached = self._find_reached()
            self.first = self._find_first()
            self._clean()
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

    def _find_reached(self) -> int | None:
        """The layer that the gradient has come down to."""
        if self._path(_BACKWARD, self.layers[0]).exists():
            return self.layers[0]
        reached = min(self._numbers(_GRADIENT), default=None)
        if reached is not None:
            done = [layer for layer in self.layers if layer >= reached]
            self._need(_BACKWARD, done)
            self._need(_HIDDEN, range(self.layers[0], reached))
        return reached

    def _find_first(self) -> int | None:
        finished = {layer for layer in self.layers if self._path(_LAYER, layer).exists()}
        if self.reached is not None:
            self._need(_LAYER, self.layers)
            return self.top
        if self.top is None and finished.issuperset(self.layers):
            return self.layers[-1] + 1
        ready = [
            number
            for number in self._numbers(_HIDDEN)
            if all(layer in finished for layer in self.layers if layer < number)
        ]
        if finished and not ready:
            raise StatisticsError(
                f"{self.folder} has statistics of layers {sorted(finished)} but not the hidden states to go on from; "
                "start again with --fresh"
            )
        if ready and self.top is not None:
            self._need(_HIDDEN, range(self.layers[0], ready[-1]))
        return ready[-1] if ready else None

    def _need(self, pattern: str, layers: Sequence[int]) -> None:
        """Raise StatisticsError if a file is not there."""
        for layer in layers:
            if not self._path(pattern, layer).exists():
                raise StatisticsError(f"{self._path(pattern, layer)} is missing; start again with --fresh")

    def _clean(self) -> None:
        """Delete what a kill kept from being deleted."""
        for number in self._numbers(_HIDDEN):
            used = self.top is not None and number >= self.layers[0] and (self.reached is None or number < self.reached)
            if self.first is not None and number < self.first and not used:
                self._path(_HIDDEN, number).unlink()
        if self.reached is not None:
            for number in self._numbers(_GRADIENT):
                if number > self.reached:
                    self._path(_GRADIENT, number).unlink()
            if self.top is not None:
                self._path(_HIDDEN, self.top).unlink(missing_ok=True)

    def _numbers(self, pattern: str) -> list[int]:
        """Layers whose file of this kind is there, ascending."""
        stem = pattern.partition("-")[0]
        found = (re.fullmatch(rf"{stem}-(\d+)\.bin", file.name) for file in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _path(self, pattern: str, layer: int) -> Path:
        return self.folder / pattern.format(layer)

    def write_hidden(self, layer: int) -> AbstractContextManager[Callable[[Tensor], None]]:
        """Yield what takes the hidden states that go into `layer`, batch after batch.

        Raises:
            StorageError: the disk is full.
        """
        return _written(self._path(_HIDDEN, layer))

    def read_hidden(self, layer: int, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Iterator[Tensor]:
        """The hidden states that go into `layer`, batch after batch.

        Raises:
            StatisticsError: the file is too short or too long.
        """
        return _read(self._path(_HIDDEN, layer), shapes, dtype)

    def write_gradient(self, layer: int) -> AbstractContextManager[Callable[[Tensor], None]]:
        """As `write_hidden`, for their gradient."""
        return _written(self._path(_GRADIENT, layer))

    def read_gradient(self, layer: int, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Iterator[Tensor]:
        """As `read_hidden`, for their gradient."""
        return _read(self._path(_GRADIENT, layer), shapes, dtype)

    def finish_layer(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Store the statistics of a layer, none for a dense one, and drop what went into it unless the way back needs
        it.

        Its output must be there already.
        """
        self._save(_LAYER, layer, tensors)
        if self.top is None or layer < self.layers[0]:
            self._path(_HIDDEN, layer).unlink(missing_ok=True)

    def finish_head(self) -> None:
        """Drop what came out of the last layer. Its gradient must be there already."""
        self._path(_HIDDEN, self.top or 0).unlink(missing_ok=True)

    def write_backward(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Store the statistics of a layer that need gradients."""
        self._save(_BACKWARD, layer, tensors)

    def finish_backward(self, layer: int) -> None:
        """Drop what went into a layer, and the gradient that came into it. What it gave must be there already."""
        self._path(_HIDDEN, layer).unlink(missing_ok=True)
        self._path(_GRADIENT, layer + 1).unlink(missing_ok=True)

    def _save(self, pattern: str, layer: int, tensors: dict[str, Tensor]) -> None:
        if tensors:
            with atomic_file(self._path(pattern, layer)) as path:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    def statistics(self) -> dict[tuple[int, str], Tensor]:
        """``(layer, name) -> tensor`` of all layers.

        Raises:
            StatisticsError: a file is damaged.
        """
        found: dict[tuple[int, str], Tensor] = {}
        for layer in self.layers:
            for pattern in (_LAYER,) if self.top is None else (_LAYER, _BACKWARD):
                path = self._path(pattern, layer)
                try:
                    tensors = load_file(path)
                except Exception as error:  # foreign bytes; what their parser raises is not ours to list
                    raise StatisticsError(f"{path} is not readable: {error}; start again with --fresh") from error
                found |= {(layer, name): tensor for name, tensor in tensors.items()}
        return found

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _refuse_others(target: Path, world: int, resume: bool) -> None:
    """Refuse to go on beside what another number of processes left; without `resume` that is deleted."""
    for folder in target.parent.glob(f"{glob.escape(target.name)}.partial*"):
        match = re.fullmatch(r"\.partial(?:-\d+-of-(\d+))?", folder.name.removeprefix(target.name))
        left = int(match[1] or 1) if match else world
        if left == world or not (folder / _RUN).is_file():
            continue
        if resume:
            raise ConfigError(
                f"{folder} is what is left of a run of {left} processes, and this is one of {world}; repeat that run "
                "to continue it, or start again with --fresh"
            )
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _written(target: Path) -> Iterator[Callable[[Tensor], None]]:
    with atomic_file(target) as path, open(path, "wb") as file:

        def write(tensor: Tensor) -> None:
            file.write(_bytes(tensor.contiguous()))

        yield write


def _read(path: Path, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Iterator[Tensor]:
    with open(path, "rb") as file:
        for shape in shapes:
            tensor = torch.empty(*shape, dtype=dtype)
            if file.readinto(_bytes(tensor)) != tensor.nbytes:
                raise StatisticsError(f"{path} is shorter than the calibration data; start again with --fresh")
            yield tensor
        if file.read(1):
            raise StatisticsError(f"{path} is longer than the calibration data; start again with --fresh")


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
