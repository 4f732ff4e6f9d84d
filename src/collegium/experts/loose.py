"""`LooseExperts`: the routed experts of one layer, one by one, each with a width of its own and matrices that are dense
or factored.

It is called as transformers' experts modules are, so it can stand in the place of one. A loop over the experts that
have tokens; where all experts are dense and alike, fused ones are faster.

Legend: T tokens, K slots of a token, E experts the router chooses from, d model width, f width of one expert, m rows
and n columns of a matrix, r its rank, s rows that are kept whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collegium.errors import ConfigError, UnsupportedFamilyError
from collegium.experts.from_module import expert_weights
from collegium.experts.weights import ExpertWeights
from collegium.routing.record import Routing

__all__ = ["FUSED", "LooseExpert", "LooseExperts", "LooseMatrix"]

FUSED = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
"""Names of the fused parameters that a `LooseExperts` replaces."""


class LooseMatrix(nn.Module):
    """One matrix ``[m, n]`` and its bias: ``[..., n] -> [..., m]``.

    It is `weight` ``[m, n]``, or the product of `A` ``[m, r]`` and `B` ``[r, n]``, to which `S` ``[s, n]`` is added in
    the rows that the buffer `rows` ``[s]`` names. `bias` is ``[m]`` or None.

    Raises:
        ConfigError: it is neither dense nor factored, or shapes do not fit.
    """

    weight: Any  # each of these is a parameter or None
    A: Any
    B: Any
    S: Any
    bias: Any
    rows: Any  # a buffer, or None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        A: Tensor | None = None,
        B: Tensor | None = None,
        S: Tensor | None = None,
        rows: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check(weight, A, B, S, rows)
        for name, tensor in (("weight", weight), ("A", A), ("B", B), ("S", S), ("bias", bias)):
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        self.register_buffer("rows", rows)

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        if self.weight is not None:
            return self.weight.shape[0], self.weight.shape[1]
        return self.A.shape[0], self.B.shape[1]

    @property
    def rank(self) -> int:
        """r; 0 for a dense matrix."""
        return 0 if self.A is None else self.A.shape[1]

    @property
    def kept_rows(self) -> int:
        """s."""
        return 0 if self.S is None else self.S.shape[0]

    def dense(self) -> Tensor:
        """The whole matrix ``[m, n]``, differentiable."""
        if self.weight is not None:
            return self.weight
        product = self.A @ self.B
        return product if self.S is None else product.index_add(0, self.rows, self.S)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        y = F.linear(F.linear(x, self.B), self.A, self.bias)
        return y if self.S is None else y.index_add(-1, self.rows, F.linear(x, self.S))

    def extra_repr(self) -> str:
        """The sizes, for ``print(model)``."""
        kind = "dense" if self.weight is not None else f"rank={self.rank}, kept_rows={self.kept_rows}"
        return f"{self.shape[1]}, {self.shape[0]}, {kind}, bias={self.bias is not None}"


def _check(weight: Tensor | None, A: Tensor | None, B: Tensor | None, S: Tensor | None, rows: Tensor | None) -> None:
    if weight is not None:
        fits = weight.dim() == 2 and A is None and B is None and S is None and rows is None
    elif A is None or B is None or (S is None) != (rows is None):
        fits = False
    else:
        fits = A.dim() == B.dim() == 2 and A.shape[1] == B.shape[0]
        fits = fits and (S is None or (rows is not None and S.shape == (len(rows), B.shape[1])))
    if not fits:
        given = {"weight": weight, "A": A, "B": B, "S": S, "rows": rows}
        shapes = {name: list(one.shape) for name, one in given.items() if one is not None}
        raise ConfigError(
            f"a matrix is a weight [m, n], or A [m, r], B [r, n] and perhaps S [s, n], rows [s]; got {shapes}"
        )


class LooseExpert(nn.Module):
    """One expert: `gate_proj` (None for a plain one), `up_proj` ``[f, d]`` and `down_proj` ``[d, f]``. f may be 0."""

    def __init__(self, gate: LooseMatrix | None, up: LooseMatrix, down: LooseMatrix) -> None:
        super().__init__()
        if up.shape != down.shape[::-1] or (gate is not None and gate.shape != up.shape):
            shapes = (None if gate is None else gate.shape, up.shape, down.shape)
            raise ConfigError(f"gate, up and down of an expert are [f, d], [f, d] and [d, f], not {shapes}")
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    @property
    def width(self) -> int:
        """f."""
        return self.up_proj.shape[0]

    @property
    def matrices(self) -> tuple[LooseMatrix | None, LooseMatrix, LooseMatrix]:
        """Gate, up, down."""
        return self.gate_proj, self.up_proj, self.down_proj

    @property
    def nbytes(self) -> int:
        """Of all it stores, ids of kept rows included."""
        return sum(tensor.nbytes for tensor in self.state_dict(keep_vars=True).values())

    def hidden(self, x: Tensor, interleaved: bool) -> Tensor:
        """``[..., d] -> [..., u]``: what the activation takes, gate and up as the layout of the family has them."""
        return _join(None if self.gate_proj is None else self.gate_proj(x), self.up_proj(x), interleaved, -1)


def _join(gate: Tensor | None, up: Tensor, interleaved: bool, axis: int) -> Tensor:
    """Gate and up in one tensor: one after the other along `axis`, or by turns."""
    if gate is None:
        return up
    if not interleaved:
        return torch.cat([gate, up], axis)
    axis = axis % up.dim()
    return torch.stack([gate, up], axis + 1).flatten(axis, axis + 1)


class LooseExperts(nn.Module):
    """The experts of one layer; its children ``0``, ``1``, ... are the experts.

    Args:
        experts: the `LooseExpert`s, of one model width.
        activation: ``[..., u] -> [..., f]`` for any f, as of `ExpertWeights`.
        interleaved: the activation takes gate and up by turns, not one after the other.
        post_norm: applied to each expert's output before the combine weight. Parameters of it and of the activation are
            not this module's, unless `like` made it.
        expert_map: ``[E]`` int64, for routers that choose from more experts than there are: which one an id stands for.
            A token that chooses two ids of one expert has the sum of both weights.

    Raises:
        ConfigError: there is no expert, they differ in d, or the map names one that is not there.
    """

    expert_map: Tensor | None

    def __init__(
        self,
        experts: Sequence[LooseExpert],
        activation: Callable[[Tensor], Tensor],
        *,
        interleaved: bool = False,
        post_norm: Callable[[Tensor], Tensor] | None = None,
        expert_map: Tensor | None = None,
    ) -> None:
        super().__init__()
        if len({one.up_proj.shape[1] for one in experts}) != 1:
            raise ConfigError(f"experts must share one model width; got {[one.up_proj.shape[1] for one in experts]}")
        if expert_map is not None and not set(expert_map.tolist()) <= set(range(len(experts))):
            raise ConfigError(f"expert_map {expert_map.tolist()} names experts beyond the {len(experts)} there are")
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)
        self._count, self.interleaved = len(experts), interleaved
        # in a tuple, since modules among them are not to be children under these names
        self._calls = (activation, post_norm)
        self.register_buffer("expert_map", expert_map, persistent=False)

    @classmethod
    def like(cls, module: nn.Module, experts: Sequence[LooseExpert], expert_map: Tensor | None = None) -> LooseExperts:
        """`experts` with the activation, layout and norm of an experts module of transformers, to stand in its place.

        Raises:
            UnsupportedFamilyError: `module` is not behind the common seam, or has parameters of which nothing is known.
        """
        weights = expert_weights(module)
        odd = {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
        if odd - set(FUSED):
            raise UnsupportedFamilyError(
                f"{type(module).__name__} has parameters besides its matrices ({', '.join(sorted(odd - set(FUSED)))}), "
                "so its experts cannot be taken apart"
            )
        found = cls(
            experts,
            weights.activation,
            interleaved=weights.interleaved,
            post_norm=weights.post_norm,
            expert_map=expert_map,
        )
        # what activation and norm hold must be saved and moved with the experts, under the names it had
        for name, child in module.named_children():
            found.add_module(name, child)
        if hasattr(module, "config"):
            found.config = module.config
        return found.train(module.training)

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """``[..., u] -> [..., f]``."""
        return self._calls[0]

    @property
    def post_norm(self) -> Callable[[Tensor], Tensor] | None:
        """Applied to each expert's output, or None."""
        return self._calls[1]

    @property
    def experts(self) -> list[LooseExpert]:
        """The experts there are, at most E."""
        return [self._modules[str(number)] for number in range(self._count)]  # type: ignore[misc]

    @property
    def num_experts(self) -> int:
        """E, the ids the router chooses from."""
        return self._count if self.expert_map is None else len(self.expert_map)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts, summed in float32.

        Args:
            hidden_states: ``[T, d]``.
            top_k_index: ``[T, K]``; an id from E on is an unused slot.
            top_k_weights: ``[T, K]``.

        Returns:
            ``[T, d]`` in the dtype of `hidden_states`.
        """
        if self.expert_map is not None:
            top_k_index, top_k_weights = self._merged(top_k_index, top_k_weights)
        routing = Routing.from_topk(top_k_index, top_k_weights, self._count)
        dispatch, experts = routing.dispatch(), self.experts
        dtype = next(experts[0].parameters()).dtype
        exact = torch.promote_types(torch.promote_types(hidden_states.dtype, dtype), torch.float32)
        y = torch.zeros(hidden_states.shape, dtype=exact, device=hidden_states.device)
        # under autocast too the experts compute in the dtype of their weights, as fused ones do
        with torch.autocast(hidden_states.device.type, enabled=False):
            x = hidden_states.to(dtype)
            for expert, (first, last) in zip(experts, pairwise(dispatch.offsets.tolist()), strict=True):
                if first == last:
                    continue
                token, weight = dispatch.token[first:last], routing.weight[dispatch.order[first:last], None]
                y = y.index_add(0, token, (self._run(expert, x[token]) * weight).to(exact))
        return y.to(hidden_states.dtype)

    def _run(self, expert: LooseExpert, x: Tensor) -> Tensor:
        """``[A, d]`` the output of one expert for ``x [A, d]``, without combine weights."""
        out = expert.down_proj(self.activation(expert.hidden(x, self.interleaved)))
        return out if self.post_norm is None else self.post_norm(out)

    def _merged(self, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of the experts there are, each at most once for a token; slots that are left over are unused."""
        assert self.expert_map is not None
        beyond = self.expert_map.new_full((1,), self._count)
        index = torch.cat([self.expert_map, beyond])[index.clamp(max=len(self.expert_map))]
        first = (index[:, :, None] == index[:, None, :]).int().argmax(2)  # the earliest slot of the same expert
        weight = torch.zeros_like(weight).scatter_add(1, first, weight)
        repeated = first != torch.arange(index.shape[1], device=index.device)
        return index.masked_fill(repeated, self._count), weight

    @property
    def weights(self) -> ExpertWeights:
        """Dense copies of all experts in one tensor each, as wide as the widest (neurons of zeros change nothing), one
        for each id of a map: for what looks at all experts alike. They take the memory of the layer before."""
        experts = self.experts
        f = max(expert.width for expert in experts)
        ids = range(self._count) if self.expert_map is None else self.expert_map.tolist()
        padded = [_padded(expert, f, self.interleaved) for expert in experts]
        up, down, up_bias, down_bias = (
            None if parts[0] is None else torch.stack([parts[e] for e in ids]) for parts in zip(*padded, strict=True)
        )
        assert up is not None
        assert down is not None
        return ExpertWeights(
            up=up,
            down=down,
            activation=self.activation,
            up_bias=up_bias,
            down_bias=down_bias,
            gated=experts[0].gate_proj is not None,
            interleaved=self.interleaved,
            post_norm=self.post_norm,
        )


def _padded(expert: LooseExpert, f: int, interleaved: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``up [u, d], down [d, f], up_bias [u], down_bias [d]`` with neurons of zeros up to f."""
    more = f - expert.width
    gate, up, down = expert.matrices

    def taller(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])])

    rows = _join(None if gate is None else taller(gate.dense()), taller(up.dense()), interleaved, 0)
    bias: Any = None
    if up.bias is not None:
        bias = _join(None if gate is None else taller(gate.bias), taller(up.bias), interleaved, 0)
    columns = down.dense()
    return rows, torch.cat([columns, columns.new_zeros(len(columns), more)], 1), bias, down.bias
