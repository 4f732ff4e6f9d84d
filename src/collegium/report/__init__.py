"""The numbers of a trace as a page that a person looks at, and as pictures."""

from __future__ import annotations

from collegium.report.measured import Measured, measure
from collegium.report.page import write_figures, write_report

__all__ = ["Measured", "measure", "write_figures", "write_report"]
