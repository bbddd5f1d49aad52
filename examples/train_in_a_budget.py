"""Backpropagation through a long sequence inside an activation budget: python examples/train_in_a_budget.py"""

import torch

from millpond import recompute


def main(steps: int = 2000, updates: int = 3) -> None:
    torch.manual_seed(0)
    cell, head = torch.nn.LSTMCell(8, 32), torch.nn.Linear(32, 1)
    inputs = torch.randn(steps, 4, 8)
    target = inputs[:, :, 0].cumsum(0) / 10  # what has to be remembered
    state = (torch.zeros(4, 32), torch.zeros(4, 32))
    optimizer = torch.optim.Adam([*cell.parameters(), *head.parameters()], lr=1e-2)

    size = recompute.measure(cell, inputs[0], state)
    budget = steps * size.internal_bytes // 20  # a twentieth of what plain backpropagation keeps
    plan = recompute.plan(
        length=steps, budget=budget, hidden_bytes=size.hidden_bytes, internal_bytes=size.internal_bytes
    )
    print(f"{plan.peak_bytes} of {steps * size.internal_bytes} bytes, {plan.forwards / steps:.2f} forwards a step")
    for _ in range(updates):
        outputs, _ = recompute.bptt(cell, inputs, state, budget=budget)
        loss = (head(outputs).squeeze(-1) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
