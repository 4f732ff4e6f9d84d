import torch

from collegium import Routing, load, tap
from collegium.assets import model_folder
from collegium.sites import Order, Site


class FewerExperts:
    """Keeps the best expert of each token only."""

    order = Order.TOP_K

    def __call__(self, site: Site, x: torch.Tensor, routing: Routing) -> Routing:
        best = routing.weight_TK.argmax(1, keepdim=True)
        weight = routing.weight_TK.sum(1, keepdim=True)
        return routing.with_assignments(routing.index_TK.gather(1, best), weight)


model = load(model_folder("demo"), dtype=torch.float32)
ids = torch.arange(64)[None] + 300
with torch.no_grad():
    usual = model(ids, labels=ids).loss
    with tap(model, FewerExperts()):
        fewer = model(ids, labels=ids).loss
print(f"loss {usual:.3f} with all experts of each token, {fewer:.3f} with one")
