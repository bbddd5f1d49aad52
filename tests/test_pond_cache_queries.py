"""What a PondCache sees of the model that it is given to: queries, attention, layers of different length."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM

from millpond import ModelError, PolicyError, PondCache
from tests.cache.text_model import Newest, text_model
from tests.nightly import nightly

IDS = torch.randint(0, 97, (1, 90), generator=torch.Generator().manual_seed(3))


def in_blocks(model, cache: PondCache, *sizes: int) -> None:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        for block in IDS[:, : sum(sizes)].split(sizes, dim=1):
            model(block, past_key_values=cache)


def own_queries(model, count: int) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Each layer's rotated queries [heads, n, D] of a plain forward, as the model's own file rotates them."""
    seen: list[Tensor] = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: seen.append(output))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(IDS[:, :count])
    for hook in hooks:
        hook.remove()
    rotate = sys.modules[type(model.model).__module__].apply_rotary_pos_emb
    angles = model.model.rotary_emb(IDS.float(), torch.arange(count)[None])
    heads = model.config.num_attention_heads
    return [rotate(*[each.view(1, count, heads, -1).transpose(1, 2)] * 2, *angles)[0][0] for each in seen]


def test_the_queries_are_those_of_the_model() -> None:
    model = text_model()
    cache = PondCache(model, "4MiB", "snapkv")
    in_blocks(model, cache, 30, 25)
    for index, expected in enumerate(own_queries(model, 55)):
        noted = cache.queries.layer(index)
        window = noted.shape[2]
        assert 0 < window <= 25
        torch.testing.assert_close(noted.flatten(0, 1), expected[:, -window:], atol=1e-4, rtol=1e-4)


def test_the_attention_summed_up_is_that_of_the_model() -> None:
    model = text_model(attn="eager")
    cache = PondCache(model, "4MiB", "h2o")
    in_blocks(model, cache, 30, 1, 20)
    with torch.no_grad():
        weights = model(IDS[:, :51], output_attentions=True).attentions
    for layer, expected in zip(cache.layers, weights, strict=True):
        received = expected[0].sum(1).unflatten(0, (layer.keys.shape[1], -1)).sum(1)
        assert layer.accumulated_attention is not None
        torch.testing.assert_close(layer.accumulated_attention[:, :51], received, atol=1e-4, rtol=1e-4)


PAST_THE_CAP = [
    (policy, attn)
    for policy in ("snapkv", "cake", "h2o", "infinite-vggt", "keydiff+diversity", "kvmerger", "mikv:base=snapkv")
    for attn in ("sdpa", "eager")
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "attn"),
    nightly(PAST_THE_CAP, but=[("snapkv", "sdpa"), ("h2o", "eager"), ("infinite-vggt", "sdpa"), ("kvmerger", "sdpa")]),
)
def test_generation_goes_on_past_the_cap(policy: str, attn: str) -> None:
    model = text_model(attn=attn)
    ample = PondCache(model, "8MiB", policy)
    plain = model.generate(IDS[:, :20], max_new_tokens=60, do_sample=False)
    assert torch.equal(model.generate(IDS[:, :20], past_key_values=ample, max_new_tokens=60, do_sample=False), plain), (
        "with room for all, what is seen of the model changes nothing"
    )
    cache = PondCache(model, 170_000, policy)
    out = model.generate(
        IDS, past_key_values=cache, prefill_chunk_size=cache.headroom, max_new_tokens=260, do_sample=False
    )
    assert out.shape == (1, 350)
    assert cache.compactions >= 3
    assert cache.ledger.peak <= 170_000
    assert all(layer.length <= layer.capacity for layer in cache.layers)


def test_layers_of_different_length_attend_to_what_they_hold() -> None:
    """A step behind a compaction that left layers of different length, against attention written out over what each holds."""
    model = text_model(attn="eager")
    cache = PondCache(model, 60_000, "infinite-vggt")
    size = cache.headroom
    in_blocks(model, cache, *[size] * (80 // size))
    seen = cache.get_seq_length()
    with torch.no_grad():
        out = model(IDS[:, seen : seen + 2], past_key_values=cache, output_attentions=True)
    assert len({layer.length for layer in cache.layers}) > 1
    for layer, weights in zip(cache.layers, out.attentions, strict=True):
        assert weights.shape[-1] == layer.length
        assert float(weights[0, :, 0, -1].abs().max()) == 0, "the first of the two does not see the second"
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_what_is_taken_back_is_not_remembered_as_a_query() -> None:
    model = text_model()
    cache, twin = PondCache(model, "4MiB", "snapkv"), PondCache(model, "4MiB", "snapkv")
    in_blocks(model, cache, 30, 9)
    cache.crop(-4)
    in_blocks(model, twin, 30, 5)
    for index in range(len(cache.layers)):
        noted = cache.queries.layer(index)
        torch.testing.assert_close(noted, twin.queries.layer(index)[:, :, -noted.shape[2] :], atol=1e-5, rtol=1e-5)
    summing = PondCache(model, "4MiB", "h2o")
    in_blocks(model, summing, 10)
    assert not summing.is_croppable
    with pytest.raises(ModelError, match="sums up attention"):
        summing.crop(-1)


def test_forwards_on_another_cache_are_not_looked_at_and_hooks_go_with_the_cache() -> None:
    model = text_model()
    hooks = model.model._forward_pre_hooks
    before = len(hooks)
    cache, other = PondCache(model, "4MiB", "snapkv"), PondCache(model, "4MiB", "snapkv")
    in_blocks(model, other, 12)
    with torch.no_grad():
        model(IDS)
    assert cache.queries.counts == [0] * len(cache.layers)
    with pytest.raises(RuntimeError), torch.no_grad():
        model(inputs_embeds=torch.zeros(1, 3, 7), past_key_values=cache)  # a forward that fails in the middle
    in_blocks(model, cache, 12)
    assert torch.equal(cache.queries.rows, other.queries.rows)
    gone = weakref.ref(cache)
    del cache, other
    gc.collect()
    assert gone() is None
    assert len(hooks) == before


def test_a_rotary_embedding_of_another_layout_is_refused() -> None:
    config = CohereConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = CohereForCausalLM(config).eval()
    with pytest.raises(ModelError, match="rotary embedding"):
        PondCache(model, "1MiB", "snapkv")
    PondCache(model, "1MiB", Newest())  # where no query is looked at it does not matter


@pytest.mark.parametrize("policy", ["streammem", "hermes"])
def test_a_proxy_text_is_a_matter_of_sessions(policy: str) -> None:
    with pytest.raises(PolicyError, match="chat template"):
        PondCache(text_model(), "1MiB", policy)


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    nightly(["full", "h2o", "snapkv", "infinite-vggt", "mikv:base=snapkv"], but=["full", "infinite-vggt", "h2o"]),
)
def test_a_fork_goes_on_as_the_cache_would_have_and_leaves_it_alone(policy: str) -> None:
    model = text_model()
    cache = PondCache(model, None if policy == "full" else 170_000, policy)
    in_blocks(model, cache, *[min(10, cache.headroom)] * 6)
    ids = IDS[:, : cache.get_seq_length() + 5]
    before = [layer.keys[:, :, : layer.length].clone() for layer in cache.layers]

    def go_on(each: PondCache) -> Tensor:
        out: Tensor = model.generate(ids, past_key_values=each, max_new_tokens=120, do_sample=False)
        return out

    answer = go_on(cache.fork())
    for layer, kept in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, : layer.length], kept)
    assert torch.equal(go_on(cache.fork().fork()), answer)
    assert torch.equal(go_on(cache), answer)
