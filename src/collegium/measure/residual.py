"""The residual stream that enters a MoE block: what the block's output is added to.

Decoder layers hand their block a normed copy of the stream, so the stream itself is the input of that norm. Which
module is the norm is seen while the layer runs: it is the neighbour of the block whose output the block is given.

Legend: B sequences, S tokens of a sequence, T = B * S, d model width.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from collegium.errors import UnsupportedFamilyError
from collegium.sites import Site

__all__ = ["Residuals"]


class Residuals:
    """While entered, keeps the stream that enters each block, from the block's start until it is asked for."""

    def __init__(self, model: nn.Module, sites: Iterable[Site]) -> None:
        self._sites = {site.path: site for site in sites}
        self._model = model
        self._handles: list[Any] = []
        self._normed: dict[str, tuple[Tensor, Tensor]] = {}  # (input, output) of the neighbour that ran last
        self._streams: dict[str, Tensor | None] = {}

    def __enter__(self) -> Residuals:
        for path, site in self._sites.items():
            layer = self._model.get_submodule(path.rpartition(".")[0])
            for module in layer.children():
                if module is not site.block:
                    self._handles.append(module.register_forward_hook(self._neighbour(path)))
            self._handles.append(site.block.register_forward_pre_hook(self._start(path), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._normed.clear()
        self._streams.clear()

    def take(self, site: Site) -> Tensor:
        """``[T, d]`` the stream that entered the block of the forward that is running; once.

        Raises:
            UnsupportedFamilyError: the block is given something that no norm beside it put out.
        """
        stream = self._streams.pop(site.path, None)
        if stream is None:
            raise UnsupportedFamilyError(
                f"{site.path} (family {site.family!r}): the residual stream is not the input of a norm right before "
                "the MoE block, so it cannot be seen; leave out the statistics that need it (EASY-EP)"
            )
        return stream.detach().reshape(-1, stream.shape[-1])

    def _neighbour(self, path: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                self._normed[path] = (args[0], output)

        return keep

    def _start(self, path: str) -> Any:
        def look(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()][:1]
            before, after = self._normed.pop(path, (None, None))
            self._streams[path] = before if given and given[0] is after else None

        return look
