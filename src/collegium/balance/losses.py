"""Losses that keep all experts busy.

Legend: T tokens, E experts, K experts per token, A assignments, S sequences, G groups of experts, f_e fraction of the
assignments that expert e got (sum_e f_e = 1), P_e mean over tokens of its probability (sum_e P_e = 1).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from collegium.balance.stats import LoadStats
from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.routing.record import Routing

__all__ = ["load_balancing_loss", "router_z_loss"]

Scope = Literal["sequence", "micro_batch", "global"]
Counts = Literal["assigned", "kept", "true", "first"]
Normalizer = Literal["assignments", "tokens"]


@method("load_balancing", kind="balance", paper="Switch Transformers (2021)", arxiv="2101.03961")
@method("global_batch", kind="balance", paper="Demons in the Detail (2025)", arxiv="2501.11873")
def load_balancing_loss(
    routing: Routing,
    *,
    scope: Scope = "micro_batch",
    stats: LoadStats | None = None,
    sequence: Tensor | None = None,
    counts: Counts = "assigned",
    normalizer: Normalizer = "assignments",
    class_weight: Tensor | None = None,
    merge: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    """The load-balancing loss of one layer: exactly 1 where every expert gets the same load, whatever P is.

    It is smallest (1) at uniform load among routings that pick experts as often as they find them probable (f = P);
    where f and P disagree it can fall below 1 without any balance, because the gradient flows through P only. f comes
    from counts and is a constant.

    Rows of ``routing.probs`` are divided by their sum first: nothing changes for softmax scores, and sigmoid scores
    are treated as in DeepSeek-V3. Padding (``routing.valid``) is in neither f nor P. No token at all gives 0.

    Other code bases, with the same routing (one layer, K experts a token)::

        Megatron-LM, OLMo-core, Pangu         1 x ours
        transformers load_balancing_loss_func K x ours, or normalizer="tokens"; it pools the tokens of all layers into
                                              one routing before it multiplies, where we average the layers' losses
        fairseq, GShard                       counts="first": the first choice only, blind to the others
        DeepSeekMoE device loss               merge = device of each expert
        MoE++ heterogeneous loss              class_weight = 1 for FFN experts, tau for zero-computation experts
        AdaMoE null experts                   merge = one group for all null experts, each true expert its own

    Formula:
        loss = E sum_e f_e P_e,  f_e = n_e / sum_i n_i of the tokens in scope,  P_e = mean_t p_te

    Cost:
        one pass over ``[T, E]`` and a count; "global" adds one sum of ``E + 1`` integers a layer and micro-batch over
        the processes, of all layers in one message.

    Use it:
        with any router that is left to choose, coefficient 0.01 or so. "global" lets experts keep to a domain as long
        as the whole batch is even; "sequence" and "micro_batch" even out what runs at a time.

    Not:
        as a measure of balance: a flat P makes it 1 however skewed the loads are. Not where its gradient costs quality,
        which a selection bias does not.

    Args:
        routing: the layer's routing, with `probs`.
        scope: over which tokens f is taken. "sequence": within each sequence, the losses of the sequences averaged
            with their token counts as weights (needs `sequence`); "micro_batch": over the tokens of `routing`;
            "global": from `stats`, that is, all processes and the micro-batches of this optimizer step so far
            (early ones see partial counts). P is always over the tokens of `routing`; with "global" it is weighted by
            ``stats.token_weight``, so averaging gradients over processes gives the loss of the whole batch.
        stats: counts for "global". It must already hold this micro-batch.
        sequence: ``[T]`` int64 sequence or document of each token, any values.
        counts: what f counts. "assigned": all assignments; "kept": those that capacity did not drop; "true": kept
            ones of experts that compute something, E and P being restricted to these; "first": each token's most
            probable expert only. With "global" the counts are those that were added to `stats`.
        normalizer: what counts are divided by. "assignments" as above; "tokens" makes f sum to A / T (K for top-K).
        class_weight: ``[E]`` factor eta_e inside the sum; the value at uniform load is then its P-weighted mean, and
            the load with the smallest loss is proportional to 1 / eta.
        merge: ``[E]`` int64 group of each expert; f_e becomes the mean of f over the group, so that only the balance
            between groups matters.
        token_mask: ``[T]`` bool, the tokens that take part (a subset; not with "global").

    Returns:
        float32 scalar.

    Raises:
        ConfigError: a part that the scope needs is missing, or settings exclude each other.
    """
    _check_choices(scope=(scope, Scope), counts=(counts, Counts), normalizer=(normalizer, Normalizer))
    _check_scope(routing, scope, stats, sequence, counts, token_mask)
    E = routing.num_experts if counts != "true" or routing.num_true is None else routing.num_true
    probs_TE = _probabilities(routing, E)
    live_T = _live(routing, token_mask, probs_TE.device)
    probs_TE = probs_TE * live_T[:, None]
    if scope == "sequence":
        assert sequence is not None
        names, group_T = torch.unique(sequence, return_inverse=True)
        S = names.numel()
        sum_SE = probs_TE.new_zeros(S, E).index_add(0, group_T, probs_TE)
    else:
        S, group_T = 1, torch.zeros(routing.num_tokens, dtype=torch.int64, device=probs_TE.device)
        sum_SE = probs_TE.sum(0, keepdim=True)
    tokens_S = torch.bincount(group_T[live_T], minlength=S)
    # P of each sequence times its share of the tokens
    P_SE = sum_SE / tokens_S.sum().clamp(min=1)

    if scope == "global":
        assert stats is not None
        n_SE, tokens_S = stats.sync()[None, :E], stats.tokens[None]
        P_SE = P_SE * stats.token_weight
    else:
        n_SE = _counts(routing, counts, live_T, group_T, S, E)
    per_S = n_SE.sum(-1) if normalizer == "assignments" else tokens_S
    f_SE = n_SE / per_S.clamp(min=1)[:, None].float()
    if merge is not None:
        _check_experts("merge", merge, E)
        group_EG = torch.nn.functional.one_hot(merge).to(f_SE)
        f_SE = f_SE @ (group_EG / group_EG.sum(0).clamp(min=1)) @ group_EG.T
    if class_weight is not None:
        _check_experts("class_weight", class_weight, E)
        f_SE = f_SE * class_weight
    return E * (f_SE * P_SE).sum()


def _probabilities(routing: Routing, E: int) -> Tensor:
    """``[T, E]`` float32, rows of sum 1."""
    if routing.probs is None:
        raise ConfigError("the load-balancing loss needs routing.probs, and this routing has none")
    probs_TE = routing.probs[:, :E].float()
    # no larger floor: sigmoid scores below it would escape the loss by shrinking
    return probs_TE / probs_TE.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _check_experts(name: str, tensor: Tensor, E: int) -> None:
    if tensor.shape != (E,):
        raise ConfigError(f"{name} is {tuple(tensor.shape)}, there are {E} experts")


def _check_choices(**settings: tuple[str, Any]) -> None:
    for name, (value, allowed) in settings.items():
        if value not in get_args(allowed):
            raise ConfigError(f"{name} is {value!r}; there are {', '.join(get_args(allowed))}")


def _check_scope(
    routing: Routing,
    scope: Scope,
    stats: LoadStats | None,
    sequence: Tensor | None,
    counts: Counts,
    token_mask: Tensor | None,
) -> None:
    if scope == "sequence" and sequence is None:
        raise ConfigError("scope 'sequence' needs the sequence (or document) of each token")
    if scope != "global":
        return
    if stats is None:
        raise ConfigError("scope 'global' needs the LoadStats that the layer's counts were added to")
    if counts != "assigned" or token_mask is not None:
        raise ConfigError("scope 'global' uses the counts in stats as they are: leave out counts= and token_mask=")
    if stats.num_experts != routing.num_experts:
        raise ConfigError(f"stats hold {stats.num_experts} experts, the routing has {routing.num_experts}")


def _live(routing: Routing, token_mask: Tensor | None, device: torch.device) -> Tensor:
    """``[T]`` bool: the tokens that are not padding and in the mask."""
    live_T = torch.ones(routing.num_tokens, dtype=torch.bool, device=device)
    for mask in (routing.valid, token_mask):
        live_T = live_T if mask is None else live_T & mask
    return live_T


def _counts(routing: Routing, counts: Counts, live_T: Tensor, group_T: Tensor, S: int, E: int) -> Tensor:
    """``[S, E]`` int64 assignments of each expert in each sequence."""
    with torch.no_grad():
        if counts == "first":
            assert routing.probs is not None
            token_A = torch.arange(routing.num_tokens, device=live_T.device)
            expert_A, keep_A = routing.probs.argmax(-1), live_T
        else:
            token_A, expert_A = routing.token, routing.expert
            keep_A = live_T[token_A] & (expert_A < E)
            if counts != "assigned" and routing.kept is not None:
                keep_A = keep_A & routing.kept
        cell_A = group_T[token_A] * E + expert_A
        return torch.bincount(cell_A[keep_A], minlength=S * E).view(S, E)


@method("router_z", kind="balance", paper="ST-MoE (2022)", arxiv="2202.08906")
def router_z_loss(routing: Routing, *, token_mask: Tensor | None = None) -> Tensor:
    """Keeps router logits small, so that their softmax stays accurate.

    It does not see loads; it holds back the largest logits. Padding is left out; no token at all gives 0.

    Formula:
        loss = mean_t(logsumexp_e(z_te)^2)

    Cost:
        one pass over ``[T, E]``; the router must keep its logits.

    Use it:
        in long runs in half precision, coefficient 1e-3, where logits grow until training diverges.

    Not:
        to balance loads: smaller logits make choices flatter, not more even.

    Args:
        routing: the layer's routing, with `logits` ``[T, E]``.
        token_mask: ``[T]`` bool, the tokens that take part.

    Returns:
        float32 scalar, 0 only where every logsumexp is 0.

    Raises:
        ConfigError: the routing holds no logits.
    """
    if routing.logits is None:
        raise ConfigError("the router z-loss needs routing.logits; set keep_logits on the router")
    live_T = _live(routing, token_mask, routing.logits.device)
    square_T = routing.logits.float().logsumexp(-1).square()
    return (square_T * live_T).sum() / live_T.sum().clamp(min=1)
