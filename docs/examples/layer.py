import torch

from collegium import MoE
from collegium.balance import BalanceConfig
from collegium.layer import after_step, balance_losses

moe = MoE(
    hidden_size=64,
    intermediate_size=128,  # of each expert
    num_experts=8,
    num_experts_per_tok=2,
    shared=128,  # width of an expert that every token passes
    router={"score": "sigmoid", "selection_bias": True},  # DeepSeek-V3's router
    balance=BalanceConfig(load_balancing=1e-3, bias_update_rate=1e-3),
)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), moe, torch.nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for step in range(3):
    x, y = torch.randn(4, 32, 16), torch.randn(4, 32, 1)
    loss = torch.nn.functional.mse_loss(model(x), y)
    (loss + sum(balance_losses(model).values())).backward()
    optimizer.step()
    optimizer.zero_grad()
    busiest = moe.balance.stats.max_violation()
    after_step(model, step)  # the selection bias moves, counts start anew
    print(f"step {step}: loss {loss.item():.3f}, MaxVio {busiest:.2f}")
