"""What millpond takes from the insides of transformers is still there; a failure says in words what a release has moved."""

import inspect
import warnings

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from millpond import ModelError, Session
from millpond.config import SessionConfig
from millpond.device import minimum_budget
from millpond.models import decoder
from millpond.models import transformers_insides as insides
from tests.models.tiny import FAMILIES, tiny
from tests.session.frames import moving


@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoder_has_the_names_that_millpond_reads(name: str) -> None:
    decoder = tiny(name).decoder
    taken = inspect.signature(type(decoder).forward).parameters
    assert {"inputs_embeds", "position_ids", "use_cache"} <= set(taken), "the decoder's forward names its inputs anew"
    assert insides.cache_argument(type(decoder)) in taken, "the decoder's forward names its cache anew"
    for layer in decoder.layers:
        block = insides.attention(layer)
        source = insides.queries_source(block)
        assert isinstance(source, torch.nn.Module), "a layer's attention keeps its query projection elsewhere"
    assert decoder.rotary_emb.inv_freq.ndim == 1, "the rotary embedding keeps its frequencies elsewhere"


def test_a_cache_layer_is_asked_what_millpond_answers() -> None:
    asked = {"lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_cache_shape"}
    new = {name for name in CacheLayerMixin.__abstractmethods__ if name != "get_max_length"} - asked
    assert not new, f"a cache layer must now also define {sorted(new)}"
    taken = inspect.signature(Cache.update).parameters
    assert list(taken)[1:4] == ["key_states", "value_states", "layer_idx"], "Cache.update takes other arguments"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_the_attention_of_uneven_layers_is_the_models_own_where_layers_are_even(name: str, implementation: str) -> None:
    """Bit for bit, with a padded batch that is not millpond's as well: the model belongs to its user."""
    family = tiny(name, attn_implementation=implementation)
    ids = torch.arange(12).view(2, 6) + 3
    padded = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            plain = family.model(input_ids=ids).logits
            batch = family.model(input_ids=ids, attention_mask=padded).logits
        session = Session(family, budget="16MiB")
        session.feed(list(moving(8)))
        return [plain, batch[padded.bool()], session._runner.pond.layers[2].keys.clone()]

    before = run()
    with insides.layers_of_different_lengths(family.decoder):
        pass
    assert family.decoder.config._attn_implementation == f"millpond_{implementation}"
    for ours, theirs in zip(run(), before, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_ready_mask_gives_what_transformers_own_gives(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in every layer, on an empty cache and behind a filled one."""
    family, masks = tiny("qwen2_5_vl", attn_implementation=implementation), []

    def run(mask: object) -> list[torch.Tensor]:
        monkeypatch.setattr(decoder, "causal_mask", mask)
        session = Session(family, budget="16MiB")
        session.feed(list(moving(8)))
        return [layer.keys for layer in session._runner.pond.layers]

    def ready(*args: object) -> torch.Tensor | None:
        masks.append(insides.causal_mask(*args))
        return masks[-1]

    for ours, theirs in zip(run(ready), run(lambda *args: None), strict=True):
        assert torch.equal(ours, theirs)
    assert any(mask is not None for mask in masks)


@pytest.mark.parametrize("name", FAMILIES)
def test_filling_gives_every_layer_what_a_forward_does_and_leaves_out_what_follows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, prompt and compactions included, and no layer behind the last one's keys runs."""
    family, ran = tiny(name), []
    for index, layer in enumerate(family.decoder.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))

    def watched() -> list[torch.Tensor]:
        ran.clear()
        session = Session(family, budget=minimum_budget(family, family.grid(56, 56), SessionConfig()))
        session.feed(list(moving(24)))
        pond = session._runner.pond
        assert pond.compactions
        return [tensor for layer in pond.layers for tensor in layer.state().tensors.values()]

    filled = watched()
    last = len(family.decoder.layers) - 1
    assert set(ran) == set(range(last))
    monkeypatch.setattr(decoder, "fill", lambda run, cache: run(cache))
    for ours, theirs in zip(filled, watched(), strict=True):
        assert torch.equal(ours, theirs)
    assert set(ran) == set(range(last + 1))


def test_another_attention_implementation_is_refused_before_a_forward() -> None:
    family = tiny("qwen2_vl")
    AttentionInterface.register("odd_one", lambda *args, **kwargs: None)
    AttentionMaskInterface.register("odd_one", lambda *args, **kwargs: None)
    family.decoder.set_attn_implementation("odd_one")
    with (
        pytest.raises(ModelError, match="layer budgets need attn_implementation 'sdpa', 'eager' or"),
        insides.layers_of_different_lengths(family.decoder),
    ):
        pass


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_that_millpond_calls_is_announced_to_go(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        session = Session(tiny(name), budget="16MiB", policy="streammem")
        session.feed(list(moving(8)))
        session.ask("what is there now", max_new_tokens=2)


def test_a_newer_transformers_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insides.transformers, "__version__", "5.99.0.dev0")
    insides.warn_above_last_tested.cache_clear()
    with pytest.warns(UserWarning, match=r"transformers 5.99.0.dev0 is newer than 5\.\d+, the last version"):
        insides.warn_above_last_tested()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        insides.warn_above_last_tested()


def test_the_installed_version_is_tested() -> None:
    insides.warn_above_last_tested.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        insides.warn_above_last_tested()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_vision_tower_takes_its_layout_ready_made(name: str) -> None:
    family = tiny(name)
    tower = family.model.model.visual
    for frames in (2, 6):
        flat, grid = family.patches([frame.pixels for frame in moving(frames)])
        with torch.no_grad():
            own, given = tower(flat, grid_thw=grid), tower(flat, grid_thw=grid, **insides.vision_layout(tower, grid))
        assert torch.equal(own.pooler_output, given.pooler_output)
