import sys

import polars as pl

from collegium import Trace
from collegium.measure import domain_information, load

trace = Trace.open(sys.argv[1])  # needs neither the model nor torch
print(f"{len(trace):,} tokens through {len(trace.layers)} layers of {trace.meta.model}")

layer = trace.layers[-1]
print("experts of the first tokens:", trace.experts(layer)[:4].tolist())  # numpy [N, K]
print(trace.scan().group_by("domain").agg(pl.len().alias("tokens")).sort("domain").collect())  # polars, lazy

for at in load(trace):
    print(f"layer {at.layer}: busiest / mean {at.max_violation.value + 1:.2f}, dead experts {list(at.dead)}")
for found in domain_information(trace):
    print(f"layer {found.layer}: I(domain; expert) = {found.bits.value:.2f} bits, shuffled {found.control:.2f}")
