"""Checks of a router, see `collegium.testing`.

Legend: T tokens, E experts, K slots, d model width, A assignments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from collegium.errors import CollegiumError, ConfigError, NonFiniteError
from collegium.layer import MoE
from collegium.routing import Router, Routing, RoutingContext
from collegium.routing.capacity.room import LimitedCapacity
from collegium.testing.running import run_all

__all__ = ["MakeRouter", "check_router", "router_checks"]

MakeRouter = Callable[[int, int, int], Router]
"""``(d, E, K) -> router``; E counts zero-computation experts in."""

D, E, K, T = 16, 12, 2, 40


def check_router(make: MakeRouter) -> None:
    """Run all checks. Raises AssertionError, which names the check."""
    run_all(router_checks(), make)


def router_checks() -> list[Callable[[MakeRouter], None]]:
    """All checks, each to be called with what makes a router."""
    return [
        check_record,
        check_sizes,
        check_seed,
        check_gradient,
        check_dtypes,
        check_permutation,
        check_causality,
        check_pieces,
        check_recomputation,
        check_layer,
        check_back_ends,
        check_padding,
        check_bad_input,
    ]


def _made(make: MakeRouter, seed: int = 0, std: float = 0.5) -> Router:
    torch.manual_seed(seed)
    router = make(D, E, K)
    router.reset_parameters(std=std)
    for own in router.own.values():
        for tensor in own.parameters():
            torch.nn.init.normal_(tensor, std=0.1)
    return router


def _context(tokens: int, training: bool = True, **more: object) -> RoutingContext:
    """Everything a router may ask for: two sequences of two documents each."""
    half = max(tokens // 2, 1)
    at = torch.arange(tokens)
    context = RoutingContext(
        layer=3,
        step=5,
        seed=7,
        training=training,
        document=at // max(half // 2, 1),
        position=at % half,
        mix=lambda values: values.cumsum(0) / torch.arange(1, len(values) + 1)[:, None],
    )
    return replace(context, **more)  # type: ignore[arg-type]


def _x(tokens: int = T, seed: int = 1) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed))


def _previous(router: Router, tokens: int) -> Routing | None:
    if not any(part.needs_previous_layer for part in router.parts):
        return None
    logits = torch.randn(tokens, router.num_experts, generator=torch.Generator().manual_seed(4))
    index = logits.topk(1).indices
    return Routing.from_topk(index, torch.ones_like(index, dtype=torch.float32), router.num_experts, logits=logits)


def _routed(router: Router, x: Tensor, training: bool = True, **more: object) -> Routing:
    return router(x, _context(len(x), training, previous=_previous(router, len(x)), **more))


def check_record(make: MakeRouter) -> None:
    """No expert twice for a token, ids in range, weights finite, probabilities not negative, drops within capacity."""
    router = _made(make)
    for training in (True, False):
        found = _routed(router, _x(), training)
        assert found.num_tokens == T
        assert found.num_experts == router.num_experts == E
        pairs = found.token * E + found.expert
        assert len(pairs.unique()) == len(pairs), "a token names an expert twice"
        assert ((found.expert >= 0) & (found.expert < E)).all(), "an expert that is none"
        assert torch.isfinite(found.weight).all(), "weights that are not finite"
        assert (found.token.diff() >= 0).all(), "assignments are not in the order of tokens"
        assert found.probs is not None
        assert (found.probs >= 0).all(), "negative probabilities"
        if isinstance(router.capacity, LimitedCapacity) and found.kept is not None:
            assert found.kept.shape == found.expert.shape
            factor = router.capacity.capacity_factor if training else router.capacity.eval_capacity_factor
            assert factor is not None, "something is dropped at inference, where nothing was to be"
            room = router.capacity.room(found, factor, len(found.expert))
            assert (found.counts("kept") <= room).all(), "an expert has more tokens than places"
            crowded = found.counts("assigned") > room
            assert (found.counts("kept")[crowded] == room[crowded]).all(), (
                "a place stays empty while a token is dropped"
            )


def check_sizes(make: MakeRouter) -> None:
    """No token, one token, and many."""
    router = _made(make)
    for tokens in (0, 1, 2, 500):
        for training in (True, False):
            found = _routed(router, _x(tokens), training)
            assert found.num_tokens == tokens
            assert found.dispatch().offsets[-1] == (found.kept.sum() if found.kept is not None else len(found.expert))


def check_seed(make: MakeRouter) -> None:
    """The same context gives the same routing, and the global random state has no part in it."""
    router = _made(make)
    for training in (True, False):
        torch.manual_seed(1)
        one = _routed(router, _x(), training)
        torch.manual_seed(2)
        other = _routed(router, _x(), training)
        assert torch.equal(one.expert, other.expert), "other experts"
        assert torch.equal(one.weight, other.weight), "other weights"
        assert (one.kept is None) == (other.kept is None)
        if one.kept is not None and other.kept is not None:
            assert torch.equal(one.kept, other.kept), "other drops"


def check_gradient(make: MakeRouter) -> None:
    """The task reaches the router through its weights, unless it says that it does not."""
    router = _made(make)
    weight = _routed(router, _x()).weight
    if not all(part.learns for part in router.parts):
        return
    assert weight.requires_grad, "the weights have no gradient; a part that means this says learns = False"
    (weight * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    assert router.weight.grad is not None
    assert torch.isfinite(router.weight.grad).all()
    assert router.weight.grad.abs().sum() > 0, "no gradient reaches the router"
    for name, own in router.own.items():
        for at, tensor in own.named_parameters():
            assert tensor.grad is not None, f"no gradient reaches {name}.{at}"


def check_dtypes(make: MakeRouter) -> None:
    """float32 inside whatever the dtype outside; of half-precision numbers the routing is that of the same numbers."""
    router, x = _made(make).to(torch.bfloat16), _x().bfloat16()
    half = _routed(router, x, training=False)
    assert half.weight.dtype == torch.float32
    whole = _routed(router.float(), x.float(), training=False)
    assert torch.equal(half.expert, whole.expert)
    torch.testing.assert_close(half.weight, whole.weight)


def check_permutation(make: MakeRouter) -> None:
    """Experts that change places take their tokens with them, where an expert's id means nothing."""
    router = _made(make)
    if router.num_true is not None and router.num_true < E:
        return
    if not all(part.symmetric for part in router.parts):
        return
    before = _routed(router, _x(), training=False)
    order = torch.randperm(E, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        for tensor in (router.weight, router.bias, router.e_score_correction_bias):
            if tensor is not None:
                tensor.copy_(tensor[order].clone())
    after = _routed(router, _x(), training=False)
    torch.testing.assert_close(_dense(after), _dense(before)[:, order])


def _dense(routing: Routing) -> Tensor:
    """``[T, E]`` weights of the kept assignments."""
    live = slice(None) if routing.kept is None else routing.kept
    dense = torch.zeros(routing.num_tokens, routing.num_experts)
    return dense.index_put((routing.token[live], routing.expert[live]), routing.weight[live].detach())


def check_causality(make: MakeRouter) -> None:
    """At inference a token's routing does not depend on later tokens of its sequence (causal), nor on other sequences
    (batch-invariant), unless a part says so."""
    router = _made(make)
    half = T // 2
    x = _x()
    plain = _dense(_routed(router, x, training=False))
    if all(part.causal for part in router.parts):
        later = x.clone()
        later[half - 5 : half] += 1
        # what comes before in the first of both sequences
        changed = _dense(_routed(router, later, training=False))
        torch.testing.assert_close(changed[: half - 5], plain[: half - 5], msg="it looks at later tokens")
    needs = any(part.needs_attention or part.needs_previous_layer for part in router.parts)
    if all(part.batch_invariant for part in router.parts) and not needs:
        other = x.clone()
        other[half:] = _x(half, seed=8)
        changed = _dense(_routed(router, other, training=False))
        torch.testing.assert_close(changed[:half], plain[:half], msg="it looks at other sequences")


def check_pieces(make: MakeRouter) -> None:
    """In pieces, as a decoder with a key-value cache gives them, tokens are routed as in one forward."""
    router = _made(make)
    parts = router.parts
    if not all(part.causal and part.batch_invariant for part in parts):
        return
    if any(part.needs_attention or part.needs_previous_layer for part in parts):
        return  # what they need is of whole forwards here
    B, S = 2, T // 2
    x, position = _x().view(B, S, D), torch.arange(S).expand(B, S)
    memory: dict[str, Tensor] = {}

    def routed(first: int, last: int, **more: object) -> Tensor:
        piece, at = x[:, first:last].reshape(-1, D), position[:, first:last].reshape(-1)
        context = _context(len(piece), False, document=None, position=at, shape=(B, last - first), **more)
        return _dense(router(piece, context)).view(B, last - first, E)

    ends = (0, 5, 6, 7, 12, S)
    pieces = [routed(first, last, memory=memory) for first, last in pairwise(ends)]
    torch.testing.assert_close(torch.cat(pieces, 1), routed(0, S), msg="with a cache it routes otherwise than without")


def check_recomputation(make: MakeRouter) -> None:
    """Gradient checkpointing replays the same random choices."""
    router, seen = _made(make), []

    def forward(x: Tensor) -> Tensor:
        found = _routed(router, x)
        seen.append(_dense(found))
        return found.weight.sum() + 0 * x.sum()

    x = _x().requires_grad_()
    total: Tensor = checkpoint(forward, x, use_reentrant=False)
    total.backward()
    # a routing without gradient keeps nothing, so nothing is computed anew
    assert len(seen) in (1, 2)
    assert torch.equal(seen[0], seen[-1])


def check_layer(make: MakeRouter) -> None:
    """In a layer a token with nothing kept gets 0 of the routed experts, and others do not."""
    layer = _layer(make)
    if any(part.needs_previous_layer for part in layer.gate.parts):
        return
    x = _x()
    y = layer(x, _context(T))
    assert y.shape == x.shape
    assert torch.isfinite(y).all()
    routing = layer.last
    assert routing is not None
    live = torch.zeros(T, dtype=torch.bool)
    kept = routing.expert if routing.kept is None else routing.expert[routing.kept]
    token = routing.token if routing.kept is None else routing.token[routing.kept]
    live[token[kept < (routing.num_true or E)]] = True
    if layer.zero_experts is None:
        assert (y[~live] == 0).all(), "a token without an expert gets something"


def _layer(make: MakeRouter) -> MoE:
    router = _made(make)
    true = router.num_true or E
    kinds = ["zero"] * (E - true)
    return MoE(D, 8, true, router.top_k, router=router, zero_experts=kinds, layer_index=3).train()


def check_back_ends(make: MakeRouter) -> None:
    """All back ends compute the same from the routing."""
    from collegium.experts.compute import backends

    layer = _layer(make)
    routing = _routed(layer.gate, _x()).only_true()
    outputs = []
    for name in backends():
        layer.experts.compute = name
        outputs.append(layer.experts(_x(), routing))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-5)


def check_padding(make: MakeRouter) -> None:
    """What stands in the place of padding changes nothing for the other tokens: it is in no average and no plan, and
    takes nobody's place."""
    router = _made(make)
    if any(part.needs_attention for part in router.parts):
        return  # whose masks are the attention's
    valid = torch.arange(T) % 5 != 0
    other = _x()
    other[~valid] = 3 * _x(seed=6)[~valid]
    for training in (True, False):
        one, two = (_dense(_routed(router, x, training, valid=valid))[valid] for x in (_x(), other))
        torch.testing.assert_close(one, two, msg="padding changes the routing of other tokens")


def check_bad_input(make: MakeRouter) -> None:
    """More slots than experts, x of another width, and logits that are NaN are refused in words."""
    for wrong in ((D, E, E + 1), (D, E, 0)):
        _refused(lambda wrong=wrong: make(*wrong), ConfigError, f"{wrong[2]} of {E} experts")  # type: ignore[misc]
    router = _made(make)
    _refused(lambda: router(torch.zeros(T, D + 1), _context(T)), ConfigError, "x of another width")
    layer = _layer(make)
    if not any(part.needs_previous_layer for part in layer.gate.parts) and all(p.learns for p in layer.gate.parts):
        x = _x()
        x[3] = torch.nan
        error = _refused(lambda: layer(x, _context(T)), NonFiniteError, "NaN")
        assert "layer 3" in str(error), "the message does not name the layer"


def _refused(call: Callable[[], object], kind: type[CollegiumError], what: str) -> CollegiumError:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{what} is not refused with {kind.__name__}")
