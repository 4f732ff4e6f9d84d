"""Collectors of what goes into a block: a sample of it, and its second moment.

Legend: T tokens that count, d model width, R rows of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from collegium.compress.collectors_router import logits_of
from collegium.compress.collectors_substitute import router_of
from collegium.errors import ConfigError, UnsupportedFamilyError
from collegium.measure.collect import Need, SiteBatch, weights_of
from collegium.measure.statistics import Entry, lowest
from collegium.rng import generator
from collegium.routing import Router
from collegium.sites import Site

__all__ = ["InputMoment", "InputSample"]

_PROBE = 64  # tokens of a batch whose logits are computed again
_APART = 0.05  # relative


@dataclass(frozen=True)
class InputSample:
    """``x_sample [R, d]``: router inputs of a random sample of the tokens; ``x_key [R]``: their keys, ascending.

    A token's key is a hash of its document, its position and its input, and the `rows` smallest keys are kept. So the
    sample is the same in whatever order the tokens come, and two passes are merged by keeping the smallest keys of
    both. The very same input of the same place counts once.

    Attributes:
        rows: R, where there are so many tokens.
    """

    rows: int = 4096

    name: ClassVar[str] = "input_sample"
    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})
    statistics: ClassVar[tuple[Entry, ...]] = (
        Entry(name="x_key", collector="input_sample", axes=("R",), dtype="int64", merge="lowest"),
        Entry(name="x_sample", collector="input_sample", axes=("R", "d"), dtype="float32", merge="rows", of="x_key"),
    )

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"rows {self.rows} must be at least 1")

    def start(self, site: Site) -> dict[str, Any]:
        d = weights_of(site).up_t.shape[1]
        router = router_of(site, "leave out the collector input_sample")
        return {"x_key": torch.zeros(0, dtype=torch.int64), "x_sample": torch.zeros(0, d), "router": router}

    def update(self, state: dict[str, Any], batch: SiteBatch) -> None:
        x = batch.x[batch.valid].float()
        _check(batch.site, state["router"], x[:_PROBE], logits_of(batch)[:_PROBE])
        keys = _keys(x, batch.document[batch.valid], batch.position[batch.valid]).cpu()
        full = len(state["x_key"]) == self.rows
        hopeful = keys < state["x_key"][-1] if full else torch.ones_like(keys, dtype=torch.bool)
        keys = torch.cat([state["x_key"], keys[hopeful]])
        rows = torch.cat([state["x_sample"], x.cpu()[hopeful]])
        place = lowest(keys, self.rows)
        state["x_key"], state["x_sample"] = keys[place], rows[place]

    def finish(self, state: dict[str, Any]) -> dict[str, Tensor]:
        return {"x_key": state["x_key"], "x_sample": state["x_sample"]}


def _check(site: Site, router: Router, x: Tensor, z: Tensor) -> None:
    """Refuse a site whose router reads something other than its experts (Gemma-4, Nemotron-H)."""
    same = x.shape[1] == router.hidden_size
    if same and len(x):
        same = bool((router.logits(x) - z).abs().mean() <= _APART * z.abs().mean())
    if not same:
        raise UnsupportedFamilyError(
            f"{site.path} (family {site.family!r}): its router does not read what its experts read; leave out the "
            "collector input_sample"
        )


def _keys(x: Tensor, document: Tensor, position: Tensor) -> Tensor:
    """``[T]`` int64 hashes, not negative, of ``x [T, d]`` float32, document and position."""
    random = generator("input sample", x.shape[1])
    odd = torch.randint(-(2**62), 2**62, (x.shape[1] + 2,), generator=random).to(x.device) * 2 + 1
    # products and sums wrap around
    key = (x.contiguous().view(torch.int32).long() * odd[2:]).sum(1) + document * odd[0] + position * odd[1]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finaliser of SplitMix64
        key = (key ^ _shifted(key, shift)) * (factor - 2**64)
    return (key ^ _shifted(key, 31)) & (2**63 - 1)


def _shifted(key: Tensor, bits: int) -> Tensor:
    """`key` shifted right, zeros coming in."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class InputMoment:
    """``c_in [d, d]``: sum of ``x x^T`` of the experts' input over all tokens, of all domains together. Large."""

    name: ClassVar[str] = "input_moment"
    needs: ClassVar[frozenset[Need]] = frozenset()
    statistics: ClassVar[tuple[Entry, ...]] = (Entry(name="c_in", collector="input_moment", axes=("d", "d")),)

    def start(self, site: Site) -> dict[str, Tensor]:
        d = weights_of(site).up_t.shape[1]
        return {"c_in": torch.zeros(d, d, dtype=torch.float64)}

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        x = batch.x[batch.valid].double()
        state["c_in"] += (x.T @ x).cpu()

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state
