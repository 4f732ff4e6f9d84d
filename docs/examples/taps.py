import torch

from collegium import load, tap
from collegium.assets import model_folder
from collegium.sites import Recorder, SwitchOff, sites

model = load(model_folder("demo"), dtype=torch.float32)
ids = torch.arange(64)[None] + 300

for site in sites(model):
    print(site.path, "E =", site.num_experts, "K =", site.top_k, site.score)

recorder = Recorder()
with tap(model, recorder), torch.no_grad():
    plain = model(ids).logits
first = sites(model)[0]
counts = recorder.routings[first.path][0].counts()
busiest = int(counts.argmax())
print(f"{first.path}: expert {busiest} got {int(counts[busiest])} of {int(counts.sum())} assignments")

with tap(model, SwitchOff({first.layer: [busiest]})), torch.no_grad():
    without = model(ids).logits
print(f"switching it off moves the logits by up to {(plain - without).abs().max().item():.3f}")

with tap(model, SwitchOff({})), torch.no_grad():
    assert torch.equal(model(ids).logits, plain)  # the neutral setting is bit-identical
