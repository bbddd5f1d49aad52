"""PondCache inside transformers' own generate and forward."""

import pytest
import torch

from millpond.cache import PondCache
from millpond.errors import BudgetError
from tests.cache.text_model import Newest, Scattered, text_model


def prompt(length: int) -> torch.Tensor:
    return torch.randint(0, 97, (1, length), generator=torch.Generator().manual_seed(1))


def generate(model, cache, length: int = 30, new: int = 40, **options):  # type: ignore[no-untyped-def]
    return model.generate(prompt(length), past_key_values=cache, max_new_tokens=new, do_sample=False, **options)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_ample_budget_equals_plain_generate(attn: str, dtype: torch.dtype) -> None:
    model = text_model(dtype, attn)
    assert torch.equal(generate(model, PondCache(model, "4MiB", Newest())), generate(model, None))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_small_budget_is_held_while_generating_ten_times_as_much(attn: str) -> None:
    model = text_model(attn=attn)
    cache = PondCache(model, 60_000, Scattered())
    lengths = []
    original = cache.update

    def watch(keys, values, layer, *args, **kwargs):  # type: ignore[no-untyped-def]
        result = original(keys, values, layer, *args, **kwargs)
        lengths.append(cache.layers[layer].length)
        assert cache.nbytes <= 60_000
        assert cache.ledger.held <= 60_000
        return result

    cache.update = watch  # type: ignore[method-assign]
    out = generate(model, cache, length=20, new=400)
    assert out.shape == (1, 420)
    assert max(lengths) <= cache.capacity < 100
    assert cache.compactions > 10
    assert cache.ledger.peak <= 60_000


def test_the_newest_tokens_under_a_cap_equal_attention_over_a_window() -> None:
    """The same logits as a forward whose 4-D mask hides what the cache forgot."""
    model = text_model()
    cache = PondCache(model, 40_000, Newest(), pinned=3)
    ids = prompt(150)
    views: list[torch.Tensor] = []  # what each token saw: the slots that the cache held when it ran
    with torch.no_grad():
        for at in range(150):
            logits = model(ids[:, at : at + 1], position_ids=torch.tensor([[at]]), past_key_values=cache).logits[0, -1]
            views.append(cache.layers[0].positions[0, : cache.length, 0].long())
            if at in (60, 149):
                mask = torch.full((1, 1, at + 1, at + 1), torch.finfo(torch.float32).min)
                for row, seen in enumerate(views):
                    mask[0, 0, row, seen] = 0.0
                whole = model(ids[:, : at + 1], attention_mask=mask).logits[0, -1]
                assert torch.allclose(logits, whole, atol=1e-4)
    assert len(views[-1]) < 60
    assert cache.compactions > 3


def test_a_prompt_above_the_cap_is_refused_by_name_and_runs_in_chunks() -> None:
    model = text_model()
    with pytest.raises(BudgetError, match="prefill_chunk_size"):
        generate(model, PondCache(model, 60_000, Newest()), length=300, new=2)
    cache = PondCache(model, 60_000, Newest())
    out = generate(model, cache, length=300, new=5, prefill_chunk_size=cache.room)
    assert out.shape == (1, 305)
    assert cache.nbytes <= 60_000


def test_the_least_budget_works_and_one_byte_less_does_not() -> None:
    model = text_model()
    with pytest.raises(BudgetError) as caught:
        PondCache(model, 1, Newest())
    least = caught.value.least
    assert least is not None
    assert str(least) in str(caught.value)
    generate(model, PondCache(model, least, Newest()), length=4, new=20)
    with pytest.raises(BudgetError):
        PondCache(model, least - 1, Newest())


def test_reset_forgets_everything() -> None:
    model = text_model()
    cache = PondCache(model, "1MiB", Newest())
    first = generate(model, cache)
    cache.reset()
    assert torch.equal(generate(model, cache), first)
