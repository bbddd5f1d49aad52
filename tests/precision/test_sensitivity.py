"""Layer by layer the sums are those of the whole model's backward pass, at a fraction of the memory."""

import torch
from torch.nn import functional

from millpond.precision.decoder import linears
from millpond.precision.sensitivity import sensitivities
from tests.models.tiny import tiny
from tests.precision.models import runs, text_model


def whole(model: torch.nn.Module, samples: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """All gradients at once."""
    weights = {name: part.weight.requires_grad_(True) for name, part in linears(model)}
    sums = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in weights.items()}
    for ids in samples:
        loss = functional.cross_entropy(model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:])
        for name, grad in zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True):
            sums[name][0].add_(grad)
            sums[name][1].add_(grad.square())
    return sums


def test_layer_by_layer_is_all_at_once() -> None:
    for model, samples in ((text_model(layers=3), runs(samples=3)), (tiny("qwen2_5_vl").model, runs(samples=2) % 50)):
        want, seen = whole(model, samples), []
        for found in sensitivities(model, samples):
            seen.append(found.index)
            assert all(name.startswith(f"{found.index}.") for name in found.square)
            for name, square in found.square.items():
                assert torch.allclose(found.gradient[name], want[name][0], rtol=1e-4, atol=1e-6)
                assert torch.allclose(square, want[name][1], rtol=1e-4, atol=1e-9)
        assert seen == [2, 1, 0]
        assert not any(parameter.requires_grad for parameter in model.parameters())
