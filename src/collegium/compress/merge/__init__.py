"""Merges: the experts of a group become one expert."""

from collegium.compress.merge.align import Alignment, alignment
from collegium.compress.merge.average import Average
from collegium.compress.merge.dern import Dern
from collegium.compress.merge.mc_smoe import McSmoe
from collegium.compress.merge.registry import Merge, find_merge, merges
from collegium.compress.merge.sub_moe import SubMoe

__all__ = ["Alignment", "Average", "Dern", "McSmoe", "Merge", "SubMoe", "alignment", "find_merge", "merges"]
