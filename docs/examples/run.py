"""Run the demo model with a quarter of its experts in memory."""

import torch
from transformers import AutoTokenizer

from collegium.assets import SHIPPED
from collegium.offload.model import load_offloaded

tokenizer = AutoTokenizer.from_pretrained(SHIPPED["demo"])
with load_offloaded("demo", experts=16) as found:
    ids = torch.tensor([tokenizer("def main(").input_ids])
    text = found.model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=1)
    print(tokenizer.decode(text[0]))
    counters = found.counters()
    print(f"{counters['hits']:.0f} experts were in memory, {counters['misses']:.0f} were read")
