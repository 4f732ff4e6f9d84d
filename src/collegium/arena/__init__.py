"""Methods against one another: the same text, the same computation for a token, several seeds, one table."""

from __future__ import annotations

from collegium.arena.plan import ArenaPlan
from collegium.arena.rank import Ranking, swiss_rounds
from collegium.arena.results import LABELS, Entry, Results, collect
from collegium.arena.run import run_arena

__all__ = ["LABELS", "ArenaPlan", "Entry", "Ranking", "Results", "collect", "run_arena", "swiss_rounds"]
