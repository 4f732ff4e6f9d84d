import tempfile

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from collegium import export, install, load, save
from collegium.models import MoEConfig

config = Qwen3Config(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
model = install(Qwen3ForCausalLM(config), MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64))
ids = torch.arange(32)[None]

with tempfile.TemporaryDirectory() as folder:
    save(model, f"{folder}/ours")  # config and safetensors; loading executes nothing from it
    again = load(f"{folder}/ours")
    print("same logits after save and load:", torch.equal(model.eval()(ids).logits, again(ids).logits))

    export(model, "qwen3_moe").save_pretrained(f"{folder}/plain")  # for any engine
    plain = AutoModelForCausalLM.from_pretrained(f"{folder}/plain")
    difference = (plain(ids).logits - model(ids).logits).abs().max().item()
    print(f"plain Qwen3-MoE differs by {difference:.1e}")
