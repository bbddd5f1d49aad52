"""PondCache inside transformers' own generate and forward."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from millpond import PondCache
from millpond.errors import BudgetError, MillpondError, ModelError, PolicyError
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


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_small_budget_is_held_while_generating_ten_times_as_much(attn: str) -> None:
    model = text_model(attn=attn)
    cache = PondCache(model, 60_000, Scattered())
    lengths = []
    original = cache.update

    def watch(keys, values, layer, *args, **kwargs):  # type: ignore[no-untyped-def]
        result = original(keys, values, layer, *args, **kwargs)
        lengths.append(cache.layers[layer].length)
        assert cache.storage.nbytes <= 60_000
        assert cache.ledger.held <= 60_000
        return result

    cache.update = watch  # type: ignore[method-assign]
    out = generate(model, cache, length=20, new=400)
    assert out.shape == (1, 420)
    assert max(lengths) <= cache.plan.slots < 100
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
    out = generate(model, cache, length=300, new=5, prefill_chunk_size=cache.headroom)
    assert out.shape == (1, 305)
    assert cache.storage.nbytes <= 60_000


def test_the_least_budget_works_and_one_byte_less_does_not() -> None:
    model = text_model()
    with pytest.raises(BudgetError) as caught:
        PondCache(model, 1, Newest())
    minimum = caught.value.minimum
    assert minimum is not None
    assert str(minimum) in str(caught.value)
    generate(model, PondCache(model, minimum, Newest()), length=4, new=20)
    with pytest.raises(BudgetError):
        PondCache(model, minimum - 1, Newest())


def test_reset_forgets_everything() -> None:
    model = text_model()
    cache = PondCache(model, "1MiB", Newest())
    first = generate(model, cache)
    cache.reset()
    assert torch.equal(generate(model, cache), first)


def test_a_second_generate_runs_the_new_tokens_only_also_after_a_compaction() -> None:
    model = text_model()
    cache = PondCache(model, 120_000, Newest())
    first = generate(model, cache, length=20, new=100)
    assert cache.compactions > 0
    seen, ran = cache.get_seq_length(), []
    assert seen == first.shape[1] - 1
    update = cache.update

    def watch(keys, values, layer, *args, **kwargs):  # type: ignore[no-untyped-def]
        ran.append(keys.shape[2])
        return update(keys, values, layer, *args, **kwargs)

    cache.update = watch  # type: ignore[method-assign]
    ids = torch.cat([first, prompt(5)], dim=1)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert ran[0] == 6  # five new ones, and the last that was generated and had not run
    assert torch.equal(out[:, : ids.shape[1]], ids)
    assert cache.get_seq_length() == out.shape[1] - 1
    assert int(cache.layers[0].positions[:, : cache.length].max()) == out.shape[1] - 2


def test_positions_go_on_where_the_sequence_stands_without_being_given() -> None:
    model, ids = text_model(), prompt(200)
    given, default = (PondCache(model, 120_000, Scattered()) for _ in range(2))
    with torch.no_grad():
        for at in range(0, 200, 5):
            part = ids[:, at : at + 5]
            one = model(part, position_ids=torch.arange(at, at + 5)[None], past_key_values=given).logits
            other = model(part, past_key_values=default).logits
            assert torch.equal(one, other), at
    assert default.compactions > 0


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["1MiB", 80_000])
def test_prompt_lookup_and_an_assistant_take_back_what_was_proposed_in_vain(budget: str | int) -> None:
    model, assistant = text_model(), text_model(layers=1)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    ids = prompt(12).repeat(1, 2)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
        cache = PondCache(model, budget, Newest())
        out = model.generate(ids, past_key_values=cache, max_new_tokens=60, do_sample=False, **options)
        assert out.shape == (1, 84)
        assert cache.get_seq_length() == 83
        if budget == "1MiB":
            assert torch.equal(out, model.generate(ids, max_new_tokens=60, do_sample=False))
        else:
            assert cache.compactions > 0


def test_what_lies_before_the_latest_forward_cannot_be_taken_back() -> None:
    model = text_model()
    cache = PondCache(model, "1MiB", Newest())
    with torch.no_grad():
        model(prompt(8), past_key_values=cache)
        model(prompt(3), past_key_values=cache)
    cache.crop(-2)
    assert (cache.get_seq_length(), cache.length, cache.recent.text) == (9, 9, 5)
    for wrong in (-2, 4):
        with pytest.raises(ModelError, match=r"take back the 1 tokens"):
            cache.crop(wrong)


def test_arguments_of_the_wrong_kind_are_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match="made for a loaded transformers model, not for 'minnow'"):
        PondCache("minnow", "1MiB")
    with pytest.raises(PolicyError, match="policy must be a name or a Policy, not 3"):
        PondCache(text_model(), "1MiB", 3)  # type: ignore[arg-type]
    for pinned in (-1, "a"):
        with pytest.raises(MillpondError, match="pinned must be a whole number, at least 0, not"):
            PondCache(text_model(), "1MiB", pinned=pinned)  # type: ignore[arg-type]


def test_a_sliding_window_is_refused_in_one_line() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=50, num_key_value_heads=2, sliding_window=16, **sizes)
    with pytest.raises(ModelError, match="sees 16 tokens back"):
        PondCache(MistralForCausalLM(config), "1MiB")
    config.sliding_window = None
    PondCache(MistralForCausalLM(config), "1MiB")


def test_a_cache_made_in_inference_mode_works_outside_of_it_and_a_cast_model_is_refused_in_one_line() -> None:
    model = text_model()
    with torch.inference_mode():
        cache = PondCache(model, "1MiB", Newest())
        model(prompt(4), past_key_values=cache)
    assert torch.equal(generate(model, cache), generate(model, PondCache(model, "1MiB", Newest())))
    with pytest.raises(ModelError, match=r"the cache was made for .*float32, the model gives .*float16"):
        model.half()(prompt(4), past_key_values=PondCache(text_model(), "1MiB", Newest()))


def test_more_than_the_memory_that_there_is_is_refused() -> None:
    with pytest.raises(BudgetError, match="more than the memory that there is"):
        PondCache(text_model(), "100TiB")


def test_without_a_cap_the_storage_grows_with_the_sequence() -> None:
    cache = PondCache(text_model(), None, "full")
    slots = cache.plan.slots
    model = text_model()
    with torch.inference_mode():
        for start in range(0, 2 * slots, 50):
            model(torch.arange(start, start + 50)[None] % 97, past_key_values=cache)
    assert cache.length == cache.get_seq_length() >= 2 * slots
    assert cache.plan.slots >= cache.length
