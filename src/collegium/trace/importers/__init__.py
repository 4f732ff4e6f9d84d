"""Routing that was recorded elsewhere, read into a `Trace`. One file a format; `IMPORTERS` finds them by name.

    from collegium.trace.importers import Known, import_trace, read_model_facts

    known = Known(model=read_model_facts("path/to/model"))
    trace, notes = import_trace("vllm", ["responses.jsonl"], "my-trace", known)

Every importer is strict: what it does not understand is a `TraceError` that names the file and the field. What it had
to assume, because the format does not record it, comes back as notes and is kept in the trace's ``meta.data``.

Files that hold counts instead of tokens are no trace: `read_counts` reads them, and `collegium.measure.imported` makes
`Statistics` of them.
"""

from __future__ import annotations

from collegium.trace.importers import llama_cpp, router_logits, sglang, sglang_counts, vllm
from collegium.trace.importers.base import IMPORTERS, Importer, Known, ModelFacts, import_trace, read_model_facts
from collegium.trace.importers.counts import Counted, read_counts
from collegium.trace.importers.router_logits import from_router_logits

__all__ = [
    "IMPORTERS",
    "Counted",
    "Importer",
    "Known",
    "ModelFacts",
    "from_router_logits",
    "import_trace",
    "llama_cpp",
    "read_counts",
    "read_model_facts",
    "router_logits",
    "sglang",
    "sglang_counts",
    "vllm",
]
