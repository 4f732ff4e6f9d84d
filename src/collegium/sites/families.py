"""What the structure of a block cannot tell, by ``model_type``."""

from __future__ import annotations

from typing import Any

from collegium.family_scores import family_score

__all__ = ["SINCE", "UNSUPPORTED", "logits_module", "score_of"]

UNSUPPORTED = {
    "dbrx": "its experts are flattened into one matrix and its gate returns logits only",
    "doge": "its experts are rows of embedding tables behind product keys",
    "jetmoe": "it has experts in its attention too, and its gate returns a 5-tuple",
    "longcat_flash": "its experts module runs zero-compute experts of its own",
    "step3p5": "its experts module does not use transformers' experts interface",
    "step3p7": "its experts module does not use transformers' experts interface",
    "vitpose_backbone": "its experts are chosen by the data set, not by a gate",
}
"""Families with experts that no adapter covers -> why."""


SINCE = {
    "aria_text": "5.18",
    "granitemoe": "5.13",
    "granitemoehybrid": "5.13",
    "granitemoeshared": "5.13",
}
"""Families older than transformers' experts interface -> the release that put their experts behind it."""


def score_of(family: str, config: Any) -> str:
    """What makes probabilities of a gate's logits: the config's own word for it, then the family's, else "unknown"."""
    for name in ("scoring_func", "expert_selection_fn"):
        if isinstance(getattr(config, name, None), str):
            return getattr(config, name)
    return family_score(family) or "unknown"


def logits_module(family: str) -> str | None:
    """Path, inside the gate, of the module whose output is the logits; None where the gate returns them itself."""
    # the gates of these two return probabilities in the place of logits
    return "proj" if family.startswith(("gemma4", "diffusion_gemma")) else None
