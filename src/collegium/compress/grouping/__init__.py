"""Groupings: which experts of a layer become one."""

from collegium.compress.grouping.mc_smoe import McSmoe
from collegium.compress.grouping.partial_preservation import PartialPreservation
from collegium.compress.grouping.random import Random
from collegium.compress.grouping.ream import Ream
from collegium.compress.grouping.registry import Grouping, Groups, find_grouping, groupings
from collegium.compress.grouping.sub_moe import SubMoe
from collegium.compress.grouping.weights import Shares, group_shares

__all__ = [
    "Grouping",
    "Groups",
    "McSmoe",
    "PartialPreservation",
    "Random",
    "Ream",
    "Shares",
    "SubMoe",
    "find_grouping",
    "group_shares",
    "groupings",
]
