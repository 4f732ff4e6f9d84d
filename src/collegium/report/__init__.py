"""Numbers as pictures."""

from __future__ import annotations

from collegium.report.figures import domain_figure, load_figure

__all__ = ["domain_figure", "load_figure"]
