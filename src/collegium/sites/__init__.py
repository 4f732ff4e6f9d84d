"""The MoE blocks of any transformers model: find them, watch them, intervene, and run their experts on our compute.

register()                                  # makes experts_implementation="collegium" known to transformers
for site in sites(model): ...               # every MoE block: gate, experts, E, K, names on disk
with tap(model, Recorder()): model(...)     # see, or change, every routing decision
"""

from __future__ import annotations

from collegium.sites.examples import GateInputs, Recorder, SwitchOff
from collegium.sites.find import sites
from collegium.sites.seam import register
from collegium.sites.site import Site
from collegium.sites.tap import Order, Tap, tap

__all__ = ["GateInputs", "Order", "Recorder", "Site", "SwitchOff", "Tap", "register", "sites", "tap"]
