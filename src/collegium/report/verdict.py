"""What the numbers say, in plain words: rules with named thresholds, each sentence with the numbers behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.report.figures._columns import number, unsigned_zero
from collegium.report.figures.locality import mean_curve, num_experts
from collegium.report.figures.router import recalls
from collegium.report.figures.specialisation import excess, favourites
from collegium.report.figures.weights import super_words
from collegium.report.measured import Measured

__all__ = ["THRESHOLDS", "Finding", "Thresholds", "verdict"]


@dataclass(frozen=True)
class Thresholds:
    """Where the words change.

    Attributes:
        even: MaxVio of the median layer up to which a model is called balanced: the busiest expert works at most half
            as much again as the average one.
        uneven: MaxVio of the median layer from which it is called unbalanced: three times the average.
        specialised, weakly: information about the domain beyond the control, as part of what could be known
            (log2 of the number of domains), from which experts are called specialised, and slightly so.
        served: part of the requests that a cache must serve to be worth having.
        cached: part of the experts it may hold for that.
        consistent: SRP over 16 tokens from which routing is called locally consistent (the best group in the paper).
        odd: robust z-score from which a layer is called odd.
        odd_layers: layers there must be for that.
        fragile: part of the tokens with a margin under 1 % from which routing is called fragile.
        drifting: shift of a stretch's load, beyond that of documents in random order, from which load is said to drift.
        alike: mean cosine of experts from which they are called redundant.
        tokens: of a trace, below which the page warns that it is short.
    """

    even: float = 0.5
    uneven: float = 2.0
    specialised: float = 0.2
    weakly: float = 0.02
    served: float = 0.8
    cached: float = 0.5
    consistent: float = 0.5
    odd: float = 3.5
    odd_layers: int = 5
    fragile: float = 0.2
    drifting: float = 0.1
    alike: float = 0.5
    tokens: int = 2000


THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class Finding:
    """One answer of the verdict.

    Attributes:
        question: what it answers.
        answer: in a word or two.
        text: sentences with the numbers.
        grade: how good that is: "good", "mixed", "poor", or "neutral" where more is not better.
        section: of the page, with the figures behind it.
    """

    question: str
    answer: str
    text: str
    grade: str
    section: str


def verdict(
    measured: Measured, *, expert_bytes: int | None = None, thresholds: Thresholds = THRESHOLDS
) -> list[Finding]:
    """The findings, most asked for first; questions that the results cannot answer are left out.

    Args:
        expert_bytes: stored bytes of one expert, if known.
    """
    rules = (
        _balanced(measured.get("load"), thresholds),
        _specialised(measured.get("domains"), thresholds),
        _vocabulary(measured.get("tokens")),
        _offload(measured.get("cache"), measured.get("locality"), expert_bytes, thresholds),
        _odd(measured, thresholds),
        _confident(measured.get("confidence"), thresholds),
        _predictable(measured.get("predictability")),
        _drifting(measured.get("drift"), thresholds),
        _super(measured.get("super-experts")),
        _redundant(measured.get("redundancy"), thresholds),
        _changed(measured.get("fluctuation")),
    )
    return [finding for finding in rules if finding is not None]


def _balanced(loads: Sequence[Any] | None, t: Thresholds) -> Finding | None:
    if not loads:
        return None
    violation = np.array([number(load.max_violation) for load in loads])
    median, worst = float(np.median(violation)), int(violation.argmax())
    dead = sum(len(load.dead) for load in loads)
    total = sum(len(load.share) for load in loads)
    answer, grade = "partly", "mixed"
    if median <= t.even and not dead:
        answer, grade = "yes", "good"
    elif median > t.uneven or dead > 0.1 * total:
        answer, grade = "no", "poor"
    text = (
        f"In the median layer the busiest expert gets {1 + median:.2f} times an even share; in the most uneven one, "
        f"layer {loads[worst].layer}, {1 + violation[worst]:.2f} times. "
    )
    text += f"{dead:,} of {total:,} experts were never used." if dead else f"All {total:,} experts were used."
    return Finding("Is the load balanced?", answer, text, grade, "load")


def _specialised(information: Sequence[Any] | None, t: Thresholds) -> Finding | None:
    if not information:
        return None
    best = max(information, key=excess)
    domains = len(favourites(best))
    part = excess(best) / float(np.log2(max(domains, 2)))
    beaten = sum(number(found.bits) > found.control_high for found in information)
    answer, grade = "no", "neutral"
    if number(best.bits) > best.control_high and part >= t.weakly:
        answer, grade = ("yes", "good") if part >= t.specialised else ("slightly", "mixed")
    text = (
        f"Most in layer {best.layer}: an expert tells {number(best.bits):.2f} of at most "
        f"{np.log2(max(domains, 2)):.2f} bits about the domain of its tokens; with shuffled labels it is "
        f"{best.control:.2f}. {beaten} of {len(information)} layers exceed every shuffle."
    )
    if answer != "no":
        name, (top, *_) = max(favourites(best, 1), key=lambda pair: pair[1][0][1])
        even = 1 / best.share.shape[1]
        text += f" There, {name} sends {top[1]:.0%} of its assignments to expert {top[0]}; an even share is {even:.0%}."
    return Finding("Do experts specialise by domain?", answer, text, grade, "specialisation")


def _vocabulary(results: Sequence[Any] | None) -> Finding | None:
    if not results or not any(found.coverage for found in results):
        return None
    token = np.array([number(found.token) - number(found.token_control) for found in results])
    position = np.array([number(found.position) - number(found.position_control) for found in results])
    best = results[int(token.argmax())]
    text = (
        f"The token id tells {token.mean():.2f} bits about the expert beyond chance on average over layers "
        f"(layer {best.layer}: {token.max():.2f}), the position {unsigned_zero(position.mean()):.2f}."
    )
    given = [
        number(found.domain_given_token) - number(found.domain_given_token_control)
        for found in results
        if found.domain_given_token is not None and found.domain_given_token_control is not None
    ]
    context = float(np.mean(given)) if given else None
    answer = "the token"
    if context is not None:
        text += f" For the same token the domain still tells {unsigned_zero(context):.2f} bits."
        answer = "the token more than its context" if token.mean() > context else "the context more than the token"
    return Finding("What decides the expert?", answer, text, "neutral", "specialisation")


def _offload(
    curves: Sequence[Any] | None, locality: Sequence[Any] | None, expert_bytes: int | None, t: Thresholds
) -> Finding | None:
    if not curves:
        return None
    total = sum(num_experts(curve) for curve in curves)
    grid, rates = mean_curve(curves)
    lru, shuffled = rates["lru"], rates["lru_shuffled"]
    enough = int(np.argmax(lru >= t.served))
    if lru[-1] < t.served:
        answer, grade = "no", "poor"
        text = f"Even a cache of all {total:,} experts serves only {lru[-1]:.0%} of the requests of so short a trace."
    else:
        fraction, served = float(grid[enough]), float(lru[enough])
        if enough:  # between two sizes that were measured
            before, after = enough - 1, enough + 1
            fraction = float(np.interp(t.served, lru[before:after], grid[before:after]))
            served = t.served
        held = int(np.ceil(fraction * total))
        worth = fraction <= t.cached
        answer, grade = ("yes", "good") if worth else ("hardly", "poor")
        if not worth and fraction <= (1 + t.cached) / 2:
            answer, grade = "a little", "mixed"
        text = (
            f"Keeping about {held:,} of {total:,} experts ({fraction:.0%} of each layer{_size(held, expert_bytes)}) in "
            f"fast memory serves {served:.0%} of the requests, least recently used going first; with shuffled tokens "
            f"it would serve {np.interp(fraction, grid, shuffled):.0%}."
        )
        if expert_bytes:
            text += f" All experts together are {_bytes(total * expert_bytes)}."
    text += _consistency(locality, t)
    return Finding("Is offloading worth it, and how large must the cache be?", answer, text, grade, "locality")


def _consistency(locality: Sequence[Any] | None, t: Thresholds) -> str:
    whole = next((found for found in locality or () if found.layer is None), None)
    if whole is None or not len(whole.segments):
        return ""
    at = int(np.abs(np.asarray(whole.segments) - 16).argmin())
    srp, shuffled = number(whole.srp[at]), number(whole.shuffled[at])
    if not np.isfinite(srp):
        return ""
    word = "locally consistent" if srp >= t.consistent else "of little local consistency"
    return (
        f" Routing is {word}: SRP {srp:.2f} over {int(whole.segments[at])} tokens, {shuffled:.2f} when they are "
        "shuffled."
    )


def _size(experts: int, expert_bytes: int | None) -> str:
    return f", {_bytes(experts * expert_bytes)}" if expert_bytes else ""


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _odd(measured: Measured, t: Thresholds) -> Finding | None:
    """Layers whose numbers are far from the median of the layers, in median absolute deviations."""
    kinds = {
        "imbalance": [(f.layer, number(f.max_violation)) for f in measured.get("load") or ()],
        "domain information": [(f.layer, excess(f)) for f in measured.get("domains") or ()],
        "locality": [
            (f.layer, number(f.srp[0]) - number(f.shuffled[0]))
            for f in measured.get("locality") or ()
            if f.layer is not None and len(f.segments)
        ],
        "router confidence": [(f.layer, number(f.top_mass)) for f in measured.get("confidence") or ()],
    }
    if len(kinds["imbalance"]) < t.odd_layers:
        return None
    reasons: dict[int, list[str]] = {}
    for kind, pairs in kinds.items():
        values = np.array([value for _, value in pairs])
        if len(values) < t.odd_layers or not np.isfinite(values).all():
            continue
        middle = float(np.median(values))
        # 1.4826 makes the median absolute deviation a standard deviation for normal data; the floor keeps layers that
        # agree to a hundredth from being told apart by noise
        width = max(1.4826 * float(np.median(np.abs(values - middle))), 0.01 * max(abs(middle), 0.01))
        for (layer, value), z in zip(pairs, (values - middle) / width, strict=True):
            if abs(z) > t.odd:
                reasons.setdefault(layer, []).append(f"{kind} {value:.2f} where the median is {middle:.2f}")
    if not reasons:
        return Finding("Which layers are odd?", "none", "All layers are alike in what was measured.", "good", "load")
    text = "; ".join(f"layer {layer}: {', '.join(found)}" for layer, found in sorted(reasons.items())) + "."
    answer = ", ".join(map(str, sorted(reasons)))
    return Finding("Which layers are odd?", answer, text[0].upper() + text[1:], "neutral", "load")


def _confident(results: Sequence[Any] | None, t: Thresholds) -> Finding | None:
    if not results:
        return None
    mass = float(np.mean([number(found.top_mass) for found in results]))
    fragile = float(np.mean([number(found.fragile) for found in results]))
    answer, grade = ("mostly", "good") if fragile < t.fragile else ("often not", "mixed")
    text = (
        f"The chosen experts hold {mass:.0%} of the router's probability on average; {fragile:.1%} of the choices are "
        "decided by a margin under 1 %, so rounding may turn them."
    )
    return Finding("Is the router sure?", answer, text, grade, "router")


def _predictable(results: Sequence[Any] | None) -> Finding | None:
    if not results:
        return None
    _, means = recalls(results)
    if not means:
        return None
    best = max(means, key=lambda name: means[name])
    text = f"Best guess: by {best}, which finds {means[best]:.0%} of the experts before they are chosen"
    if "frequency" in means and best != "frequency":
        text += f"; always guessing the most frequent ones finds {means['frequency']:.0%}"
    answer = f"{means[best]:.0%} by {best}"
    return Finding("Can the next experts be guessed?", answer, text + ".", "neutral", "router")


def _drifting(drifts: Sequence[Any] | None, t: Thresholds) -> Finding | None:
    if not drifts:
        return None
    shift = float(np.mean([np.mean(found.shift) for found in drifts]))
    control = float(np.mean([found.control for found in drifts]))
    answer, grade = ("no", "good") if shift - control < t.drifting else ("yes", "mixed")
    text = (
        f"A stretch of the trace has {shift:.0%} of its load elsewhere than the whole, on average over layers; with "
        f"documents in random order it would be {control:.0%}."
    )
    return Finding("Does the load change over the trace?", answer, text, grade, "load")


def _super(found: Any) -> Finding | None:
    if found is None:
        return None
    answer = str(len(found.found)) if found.found else "none"
    return Finding("Are there super experts?", answer, super_words(found), "neutral", "experts")


def _redundant(results: Sequence[Any] | None, t: Thresholds) -> Finding | None:
    if not results:
        return None
    outputs = float(np.mean([number(found.mean_by_outputs) for found in results]))
    weights = float(np.mean([number(found.mean_by_weights) for found in results]))
    control = float(np.mean([number(found.control) for found in results]))
    answer, grade = ("some", "mixed") if outputs >= t.alike else ("no", "good")
    text = (
        f"The mean cosine between two experts of a layer is {weights:.2f} by weights and {outputs:.2f} by outputs; "
        f"random experts have {control:.2f}."
    )
    return Finding("Are experts redundant?", answer, text, grade, "experts")


def _changed(results: Sequence[Any] | None) -> Finding | None:
    if not results:
        return None
    changed = float(np.mean([number(found.changed) for found in results]))
    overlap = float(np.mean([number(found.overlap) for found in results]))
    text = (
        f"{changed:.0%} of the tokens have another set of experts than in the other trace; {overlap:.0%} of the "
        "experts stay."
    )
    return Finding("Did routing change between the traces?", f"{changed:.0%} of tokens", text, "neutral", "compare")
