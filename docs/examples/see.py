import sys

from collegium import Trace
from collegium.measure import cache_curves, load, local_routing_consistency

trace = Trace.open(sys.argv[1])
for layer in load(trace):
    print(f"layer {layer.layer}: MaxVio {layer.max_violation}, dead experts {layer.dead}")
whole = local_routing_consistency(trace, segments=(16,))[-1]
print(f"SRP over 16 tokens {whole.srp[0]}, shuffled {whole.shuffled[0]:.3f}")
for curve in cache_curves(trace, ratios=(2,)):
    print(f"layer {curve.layer}: an LRU cache of {curve.capacity[0]} experts serves {curve.lru[0]:.0%} of the requests")
