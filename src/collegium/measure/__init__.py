"""Numbers from traces.

What needs the model too (`collegium.measure.super_experts`, `collegium.measure.redundancy`, and the statistics pass in
`collegium.measure.collect`) is not imported here, because it needs torch.
"""

from __future__ import annotations

from collegium.measure.affinity import Affinity, CoActivation, coactivation, inter_layer_affinity
from collegium.measure.cache import CacheCurve, cache_curves
from collegium.measure.confidence import Confidence, router_confidence
from collegium.measure.congestion import Congestion, Phases, congestion, congestion_series
from collegium.measure.drift import Drift, drift
from collegium.measure.drops import Drops, drops
from collegium.measure.estimate import Estimate
from collegium.measure.load import Load, load
from collegium.measure.locality import Locality, local_routing_consistency
from collegium.measure.metric import Metric, find_metric, metrics, missing_needs, plain
from collegium.measure.predict import Predictability, predictability
from collegium.measure.specialisation import DomainInformation, domain_information
from collegium.measure.stability import EarlyRouting, Fluctuation, early_routing, routing_fluctuation
from collegium.measure.token_information import TokenInformation, token_information

__all__ = [
    "Affinity",
    "CacheCurve",
    "CoActivation",
    "Confidence",
    "Congestion",
    "DomainInformation",
    "Drift",
    "Drops",
    "EarlyRouting",
    "Estimate",
    "Fluctuation",
    "Load",
    "Locality",
    "Metric",
    "Phases",
    "Predictability",
    "TokenInformation",
    "cache_curves",
    "coactivation",
    "congestion",
    "congestion_series",
    "domain_information",
    "drift",
    "drops",
    "early_routing",
    "find_metric",
    "inter_layer_affinity",
    "load",
    "local_routing_consistency",
    "metrics",
    "missing_needs",
    "plain",
    "predictability",
    "router_confidence",
    "routing_fluctuation",
    "token_information",
]
