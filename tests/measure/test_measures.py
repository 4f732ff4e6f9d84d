"""What all measures of traces have in common."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from measure_traces import make_trace


def test_measuring_needs_no_torch(tmp_path: Path) -> None:
    documents = np.arange(40) // 4
    make_trace(
        tmp_path / "t", {layer: np.arange(40)[:, None] % 2 for layer in (0, 1)}, 2, sequences=documents,
        domains=documents % 2, domain_names=("a", "b"),
    )  # fmt: skip
    program = (
        "import sys; from collegium import Trace; from collegium.measure import domain_information, load\n"
        "from collegium.measure.affinity import coactivation, inter_layer_affinity\n"
        "from collegium.measure.drops import drops\n"
        "from collegium.measure.predict import predictability\n"
        "from collegium.measure.stability import early_routing, routing_fluctuation\n"
        "from collegium.measure.token_information import token_information\n"
        "t = Trace.open(sys.argv[1])\n"
        "for f in (load, domain_information, coactivation, inter_layer_affinity, drops, predictability): f(t)\n"
        "token_information(t); early_routing(t, t); routing_fluctuation(t, t); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "t")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
