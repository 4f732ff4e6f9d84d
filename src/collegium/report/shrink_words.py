"""What became of a model, in plain words and with the numbers behind them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from collegium.compress.judge_result import DomainScore, Judgement
from collegium.compress.judge_sides import why_no_mask
from collegium.measure.estimate import Estimate
from collegium.report.figures._columns import many, number
from collegium.report.verdict import Finding

if TYPE_CHECKING:
    from collegium.report.shrink import Shrunk

__all__ = ["LOSS", "MEASURED", "PREDICTED", "RECOVERED", "facts", "findings", "judgements", "same_loss", "sizes"]

PREDICTED, MEASURED, RECOVERED = "predicted (experts masked)", "measured (written checkpoint)", "recovered (trained)"
"""The kinds of judgements, as figures call them."""

LOSS = (0.05, 0.3)
"""Nats per token: up to the first more loss is called small, from the second on large."""
SAME = 1e-3
"""Nats per token by which prediction and measurement of one and the same model may differ: rounding."""
AGREE = (0.5, 0.8)
"""Router agreement below the first is called poor, from the second on good."""


def findings(shrunk: Shrunk) -> list[Finding]:
    """The answers, most asked for first; questions that nothing was measured for are left out."""
    judged = _compared(shrunk)
    rules = (
        _smaller(shrunk),
        _cost(shrunk),
        _as_predicted(shrunk),
        _regained(shrunk),
        _worst(judged),
        _routers(shrunk, judged),
        _worst_layer(judged),
        _supers(shrunk),
    )
    return [finding for finding in rules if finding is not None]


def _compared(shrunk: Shrunk) -> Judgement | None:
    """The last of those judged against the original: of the result, if that was possible."""
    found = [one for one in judgements(shrunk).values() if one.whole is not None]
    return found[-1] if found else None


def judgements(shrunk: Shrunk) -> dict[str, Judgement]:
    """Those there are, by kind."""
    found = {PREDICTED: shrunk.predicted, MEASURED: shrunk.measured, RECOVERED: shrunk.recovered}
    return {kind: one for kind, one in found.items() if one is not None}


def same_loss(predicted: Judgement, measured: Judgement) -> float:
    """The largest difference between predicted and measured loss over all domains, in nats per token."""
    theirs = {one.domain: one.loss.value for one in predicted.domains}
    gaps = [abs(one.loss.value - theirs[one.domain]) for one in measured.domains if one.domain in theirs]
    return max([abs(measured.overall.loss.value - predicted.overall.loss.value), *gaps])


def _smaller(shrunk: Shrunk) -> Finding:
    before, after = shrunk.before, shrunk.after
    text = (
        f"{size(after.nbytes)} instead of {size(before.nbytes)}, {after.parameters:,} parameters instead of "
        f"{before.parameters:,}."
    )
    if before.active_parameters and after.active_parameters:
        share = after.active_parameters / before.active_parameters
        text += f" A token uses {share:.0%} of the parameters it used before."
    return Finding(
        "How much smaller is it?", f"{1 - after.nbytes / before.nbytes:.0%} smaller", text, "neutral", "facts"
    )


def _cost(shrunk: Shrunk) -> Finding | None:
    found = _compared(shrunk) or shrunk.recovered or shrunk.measured
    if found is None:
        return None
    how = "predicted" if found is shrunk.predicted else "measured"
    one = found.overall
    if one.difference is None or one.whole_loss is None:
        text = f"Perplexity {one.perplexity:,.2f} on {one.tokens:,} held-out tokens; the original was not measured."
        return Finding("What does it cost?", f"loss {one.loss.value:.3f}", text, "neutral", "loss")
    more = one.difference.value
    grade = "good" if more <= LOSS[0] else "mixed" if more < LOSS[1] else "poor"
    text = (
        f"Nats per token go from {one.whole_loss:.4f} to {one.loss.value:.4f} on {one.tokens:,} held-out tokens, "
        f"{how}{_interval(one.difference)}; perplexity from {one.whole_perplexity:,.2f} to {one.perplexity:,.2f}"
    )
    if one.bits_per_byte is not None and one.whole_bits_per_byte is not None:
        text += f", bits per byte from {one.whole_bits_per_byte:.3f} to {one.bits_per_byte:.3f}"
    return Finding("What does it cost?", f"{more:+.3f} nats per token", text + ".", grade, "loss")


def _as_predicted(shrunk: Shrunk) -> Finding | None:
    predicted, measured = shrunk.predicted, shrunk.measured
    question = "Is it what was predicted?"
    if predicted is None:
        why = why_no_mask(shrunk.plan) or "it was left out"
        return Finding(question, "not predicted", f"There is no prediction of the loss: {why}.", "neutral", "loss")
    if measured is None:
        text = "The checkpoint was not measured; what the page shows is the prediction."
        return Finding(question, "not measured", text, "mixed", "loss")
    gap = same_loss(predicted, measured)
    # of another number of tokens, both may be right
    same = gap <= SAME
    text = (
        f"Predicted {predicted.overall.loss.value:.4f}, measured {measured.overall.loss.value:.4f} nats per token; the "
        f"largest difference of a domain is {gap:.1e}."
    )
    text += (
        " Before anything was written, the plan was tried on the original with the other experts masked: the same "
        "model, so only rounding may differ."
    )
    return Finding(question, "yes" if same else "no", text, "good" if same else "poor", "loss")


def _regained(shrunk: Shrunk) -> Finding | None:
    before, after = shrunk.measured, shrunk.recovered
    if before is None or after is None:
        return None
    gain = before.overall.loss.value - after.overall.loss.value
    text = (
        f"Training took the loss from {before.overall.loss.value:.4f} to {after.overall.loss.value:.4f} nats per token"
    )
    lost = before.overall.difference
    text += "." if lost is None or lost.value <= 0 else f", {gain / lost.value:.0%} of what had been lost."
    return Finding(
        "What did training regain?", f"{gain:.3f} nats per token", text, "good" if gain > 0 else "poor", "loss"
    )


def _worst(found: Judgement | None) -> Finding | None:
    if found is None or len(found.domains) < 2 or found.domains[0].difference is None:
        return None
    ranked = sorted(found.domains, key=lambda one: -number(one.difference))
    worst, best = ranked[0], ranked[-1]
    text = (
        f"{worst.domain} loses {_more(worst)} nats per token{_interval(worst.difference)}, {best.domain} {_more(best)}"
        f"{_interval(best.difference)}."
    )
    return Finding("Which domain suffers most?", worst.domain, text, "neutral", "loss")


def _more(one: DomainScore) -> str:
    return f"{number(one.difference):+.3f}"


def _routers(shrunk: Shrunk, found: Judgement | None) -> Finding | None:
    layers = [] if found is None else [one for one in found.layers if one.agreement is not None]
    if not layers:
        return None
    agreement = sum(number(one.agreement) for one in layers) / len(layers)
    present = sum(number(one.present) for one in layers) / len(layers)
    grade = "good" if agreement >= AGREE[1] else "mixed" if agreement >= AGREE[0] else "poor"
    merged = any(len(group) > 1 for one in shrunk.plan.layers for group in one.members)
    text = (
        f"Of the original's choices {present:.0%} are of experts that are still there"
        f"{' or in a merged one' if merged else ''}, and of those {agreement:.0%} "
        f"are made again, on average over {many(len(layers), 'layer')}."
    )
    return Finding("Do routers choose as before?", f"{agreement:.0%}", text, grade, "layers")


def _worst_layer(found: Judgement | None) -> Finding | None:
    layers = [] if found is None else [one for one in found.layers if one.output_error is not None]
    if not layers:
        return None
    worst = max(layers, key=lambda one: number(one.output_error))
    first = min(layers, key=lambda one: one.layer)
    text = (
        f"There the output of the MoE block is off by {number(worst.output_error):.0%} of its length; in layer "
        f"{first.layer}, where nothing before differs, by {number(first.output_error):.0%}."
    )
    return Finding("Where does it differ most?", f"layer {worst.layer}", text, "neutral", "layers")


def _supers(shrunk: Shrunk) -> Finding | None:
    if not shrunk.supers:
        return None
    kept = {one.layer: set(one.keep) for one in shrunk.plan.layers}
    named = [(layer, e) for layer, experts in sorted(shrunk.supers.items()) for e in experts]
    lost = [(layer, e) for layer, e in named if e not in kept.get(layer, ())]
    listed = ", ".join(f"{e} of layer {layer}" for layer, e in (lost or named)[:6])
    if lost:
        text = f"Expert {listed} would break many models if it went: compare the losses below."
        return Finding("Are the super experts kept?", f"{len(lost)} are not", text, "poor", "experts")
    return Finding("Are the super experts kept?", "yes", f"Expert {listed}.", "good", "experts")


def _interval(value: Estimate | None) -> str:
    return "" if value is None or math.isnan(value.low) else f" (95 %: {value.low:+.3f} to {value.high:+.3f})"


def sizes(shrunk: Shrunk) -> list[tuple[str, str, str, str]]:
    """``(what, before, after, share that is left)``."""
    before, after, plan = shrunk.before, shrunk.after, shrunk.plan
    reached = plan.reached
    numbers: list[tuple[str, int | None, int | None]] = [
        ("experts", reached.of_experts, reached.experts),
        ("parameters", before.parameters, after.parameters),
        ("parameters a token uses", before.active_parameters, after.active_parameters),
    ]
    if any(one.neurons for one in plan.layers):
        every = sum(len(one.keep) * (one.intermediate_size or 0) for one in plan.layers)
        numbers.insert(1, ("neurons of experts", every, every - sum(one.neurons_gone for one in plan.layers)))
    rows = [(what, f"{a:,}", f"{b:,}", f"{b / a:.1%}") for what, a, b in numbers if a and b is not None]
    share = f"{after.nbytes / before.nbytes:.1%}"
    return [*rows, ("size of the weights", size(before.nbytes), size(after.nbytes), share)]


def facts(shrunk: Shrunk) -> list[tuple[str, str]]:
    """``(name, value)`` rows about how it came about."""
    plan = shrunk.plan
    settings = ", ".join(f"{name} {value}" for name, value in plan.settings.items() if value is not None)
    found = [
        ("model", plan.model),
        ("family", plan.family),
        ("fingerprint", plan.fingerprint or "none"),
        ("score", f"{plan.method} ({settings})" if settings else plan.method),
        ("planner", f"{plan.planner}, {plan.asked.what} {plan.asked.value:g}"),
        ("calibrated on", "; ".join(plan.data)),
        ("for domains", ", ".join(plan.domains)),
    ]
    if plan.operator is not None:
        found.append(("new experts by", plan.operator.name))
    found.append(("routers", plan.router.mode))
    judged = next(iter(judgements(shrunk).values()), None)
    if judged is not None:
        found.append(("judged on", judged.data))
    return [*found, ("planned", f"{plan.created} by collegium {plan.collegium}")]


def size(nbytes: int) -> str:
    """``1.25 GB``."""
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.2f} MB"
