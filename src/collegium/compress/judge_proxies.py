"""Proxy metrics: statistics of single tokens on a reference text that rank models better than their mean loss does.

*Forecasting downstream performance* (arXiv 2605.18607): one teacher-forced pass over text that is a good answer gives
for each token the loss, the probability, the rank of the right token, whether it is among the k likeliest, and the
entropy of the prediction; each is aggregated in many ways, and what ranks models known already is used for new ones.
The aggregations here are our own choice, since the paper's list is not public.

Every name is ``quantity/aggregation``. Quantities: `QUANTITIES`; ranks are shares of the vocabulary, so that tokenizers
compare. Aggregations: ``mean``, ``sd``, quantiles ``q10`` to ``q90``; the mean over the quarter of the tokens whose
prediction is the least or most certain (``uncertain``, ``certain``) or that come first or last in their sequence
(``early``, ``late``); and ``per_byte``, the sum over the bytes of the text.

Legend: N predicted tokens, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from collegium.catalog import method

__all__ = ["HITS", "QUANTITIES", "proxy_metrics"]

HITS = (1, 5, 10)
QUANTITIES = ("loss", "probability", "entropy", "rank", *(f"top{k}" for k in HITS))
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
_PART = 0.25


@method("proxy-metrics", kind="metric", paper="Forecasting Downstream Performance (2026)", arxiv="2605.18607")
def proxy_metrics(
    loss: np.ndarray,
    entropy: np.ndarray,
    rank: np.ndarray,
    position: np.ndarray,
    *,
    vocabulary: int,
    nbytes: int | None,
) -> dict[str, float]:
    """All proxies of one model on one text.

    Args:
        loss, entropy: ``[N]`` nats of each predicted token, and of the distribution it was predicted from.
        rank: ``[N]`` how many tokens were likelier than the right one.
        position: ``[N]`` place of each token in its sequence.
        vocabulary: V.
        nbytes: of the text; None leaves out what is taken per byte.
    """
    values = {"loss": loss, "probability": np.exp(-loss), "entropy": entropy, "rank": rank / max(vocabulary - 1, 1)}
    values |= {f"top{k}": rank < k for k in HITS}
    parts = {
        "uncertain": entropy >= np.quantile(entropy, 1 - _PART),
        "certain": entropy <= np.quantile(entropy, _PART),
        "early": position <= np.quantile(position, _PART),
        "late": position >= np.quantile(position, 1 - _PART),
    }
    found: dict[str, float] = {}
    for name in QUANTITIES:
        x = values[name].astype(np.float64)
        found[f"{name}/mean"] = float(x.mean())
        if not name.startswith("top"):
            found[f"{name}/sd"] = float(x.std())
            found |= {f"{name}/q{round(100 * q)}": float(np.quantile(x, q)) for q in _QUANTILES}
        found |= {f"{name}/{part}": float(x[rows].mean()) for part, rows in parts.items()}
        if nbytes:
            found[f"{name}/per_byte"] = float(x.sum() / nbytes)
    return found
