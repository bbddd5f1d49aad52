"""From disk to tokens: a loaded model is the dense reference, targets are met and switched, damaged folders are refused."""

import copy
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from millpond import models, precision
from millpond.errors import BudgetError, ModelError, PrecisionError
from millpond.precision.calibration import Calibration
from millpond.precision.decoder import linears
from millpond.precision.loading import stored_bytes
from millpond.precision.selection import Selector, select
from tests.models.tiny import tiny
from tests.precision.models import quantized, runs, text_model, tokenizer


@pytest.fixture(scope="module")
def calibrated(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    shutil.copytree(stored, folder)
    precision.calibrate(folder, runs(), [3.5, 4.5], quiet=True)
    return folder


def dense(folder: Path, bits: int) -> torch.nn.Module:
    """The float model with every linear replaced by its dense reading at one bit-width."""
    model = text_model()
    loaded = dict(linears(precision.load(folder)))
    for name, linear in linears(model):
        linear.weight.data = loaded[name].weight.dense(bits)
    return model


@torch.no_grad()
@pytest.mark.parametrize("bits", [3, 5, 8])
def test_a_loaded_model_is_its_dense_reference(stored: Path, bits: int) -> None:
    model, reference = precision.load(stored, bits=bits), dense(stored, bits)
    ids = runs()[:3]
    assert torch.allclose(model(ids).logits, reference(ids).logits, atol=1e-4)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))
    beams = {**options, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), reference.generate(ids, **beams))


def test_what_is_not_quantized_stays_in_the_dtype_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "bf16"
    precision.quantize(text_model(), tokenizer(), folder, runs(), source="tiny", dtype=torch.bfloat16, quiet=True)
    model, ids = precision.load(folder, bits=8), runs(samples=1)[:, :12]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    half = text_model().to(torch.bfloat16)
    logits, exact = model(input_ids=ids).logits, half(input_ids=ids).logits
    assert logits.dtype == torch.bfloat16
    assert float((logits - exact).detach().float().norm() / exact.detach().float().norm()) < 0.1
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
    precision.calibrate(folder, runs(samples=2), [3.5], quiet=True)
    chosen = precision.load(folder, target_bits=3.5)
    chosen.generate(ids, max_new_tokens=6, do_sample=False)
    assert 3 <= chosen.effective_bits() <= 4


@torch.no_grad()
def test_prompts_longer_than_the_context_are_as_in_the_float_model(stored: Path) -> None:
    ids = runs(samples=4, length=32).reshape(1, -1)  # 128 tokens, the config says 64
    assert torch.allclose(precision.load(stored, bits=8)(ids).logits, dense(stored, 8)(ids).logits, atol=1e-4)


@pytest.mark.parametrize("target", [3.5, 4.5])
def test_targets_are_met_on_text_that_was_not_seen(calibrated: Path, target: float) -> None:
    model = precision.load(calibrated, target_bits=target)
    precision.perplexity(model, runs(samples=16, seed=9))
    assert model.effective_bits() == pytest.approx(target, abs=0.05)


def steps(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of single decoding steps, [T, V]."""
    cache, rows = None, []
    for position in range(ids.shape[1]):
        out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, -1])
    return torch.stack(rows)


@torch.no_grad()
def test_many_tokens_at_once_are_decided_like_single_steps(calibrated: Path) -> None:
    model = precision.load(calibrated, target_bits=3.5)
    ids = runs(seed=5)[:1]
    one_by_one = steps(model, ids)
    singly = {name: dict(linear.counts) for name, linear in linears(model)}
    loss = torch.nn.functional.cross_entropy(one_by_one[:-1], ids[0, 1:])
    for _, linear in linears(model):
        linear.counts.clear()
    assert precision.perplexity(model, ids) == pytest.approx(float(loss.exp()), rel=1e-4)
    # A threshold is a value that was seen, so a token may lie on it to the last bit: two decisions of all may differ.
    other = sum(
        abs(linear.counts.get(linear.high, 0) - singly[name].get(linear.high, 0)) for name, linear in linears(model)
    )
    assert other <= 2
    assert any(len(counts) == 2 for counts in singly.values()), "no linear ever used both bit-widths"


@torch.no_grad()
@pytest.mark.parametrize("infinity", [float("inf"), float("-inf")])
def test_infinite_thresholds_are_a_fixed_width_bit_for_bit(stored: Path, infinity: float) -> None:
    from millpond.precision.calibration import Choice

    model, ids = precision.load(stored), runs()[:1]
    select(model, {name: Choice(4, 5, infinity, slope=1.0) for name, _ in linears(model)})
    chosen = steps(model, ids)
    bits = 4 if infinity > 0 else 5
    select(model, {name: Choice(bits, bits) for name, _ in linears(model)})
    assert torch.equal(chosen, steps(model, ids))


@torch.no_grad()
def test_targets_switch_without_a_file_and_rows_choose_for_themselves(calibrated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    shutil.copytree(calibrated, folder)
    model = precision.load(folder, target_bits=4.5)
    shutil.rmtree(folder)
    ids = runs(seed=5)
    high = precision.perplexity(model, ids), model.effective_bits()
    for _, linear in linears(model):
        linear.counts.clear()
    model.set_target_bits(3.5)
    precision.perplexity(model, ids)
    assert model.effective_bits() < high[1] - 0.5
    with pytest.raises(PrecisionError, match=r"no target of 4 bits is calibrated; there are: 3.5, 4.5"):
        model.set_target_bits(4)
    # Two sequences in one batch decide as they do alone, but for tokens on a threshold: those are values that were seen.
    chosen = {name: linear.choose.choice for name, linear in linears(model)}
    select(model, {name: replace(choice, threshold=choice.threshold + 1e-4) for name, choice in chosen.items()})
    both = torch.stack([ids[0], ids[1]])
    together = steps_of_batch(model, both)
    for row in range(2):
        assert torch.allclose(together[row], steps(model, both[row : row + 1]), atol=1e-4)


def steps_of_batch(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    cache, rows = None, []
    for position in range(ids.shape[1]):
        out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[:, -1])
    return torch.stack(rows, dim=1)


def test_hooks_do_not_pile_up(calibrated: Path) -> None:
    model = precision.load(calibrated, target_bits=4.5)
    count = sum(len(module._forward_pre_hooks) for module in model.modules())
    for bits in (3.5, 4.5, 3.5, 4.5):
        model.set_target_bits(bits)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == count > 0
    assert all(isinstance(linear.choose, Selector) for _, linear in linears(model))


def test_memory_is_a_limit_in_real_bytes(stored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stored, folder)
    with pytest.raises(BudgetError, match="the minimum that works is") as caught:
        precision.calibrate(folder, runs(), [3.0], memory=1000, quiet=True)
    minimum = caught.value.minimum
    assert minimum is not None
    limit = minimum * 23 // 20
    made = precision.calibrate(folder, runs(), [3.25], memory=limit, quiet=True)
    assert len(set(made.max_bits.values())) > 1
    model = precision.load(folder, memory=limit, target_bits=3.25)
    assert stored_bytes(model) <= limit
    with pytest.raises(BudgetError, match="more than 2000"):
        precision.load(folder, memory=2000)


def test_an_interrupted_run_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = sys.modules["millpond.precision.quantize"]  # the package's attribute of that name is the function
    whole = quantized(tmp_path / "whole")
    folder, written = tmp_path / "cut", room.write_layer

    def fails(into: Path, index: int, *rest: object) -> None:
        if index == 0:  # the last layer comes first
            raise KeyboardInterrupt
        written(into, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "write_layer", fails)
    with pytest.raises(KeyboardInterrupt):
        quantized(folder)
    with pytest.raises(PrecisionError, match="holds no quantized model"):
        precision.load(folder)
    first = (folder / "layer-001.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(room, "write_layer", written)
    quantized(folder)
    assert (folder / "layer-001.safetensors").stat().st_mtime_ns == first
    assert not (folder / "sensitivity.state").exists()
    for file in ("layer-000.safetensors", "layer-001.safetensors", "rest.safetensors"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes()


def test_another_run_is_not_mixed_in(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PrecisionError, match="holds a quantized model already"):
        quantized(stored)
    room = sys.modules["millpond.precision.quantize"]

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    written = room.write_rest
    monkeypatch.setattr(room, "write_rest", fails)
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path)
    monkeypatch.setattr(room, "write_rest", written)
    model, words = text_model(), tokenizer()
    for other, bit_widths in ((runs(seed=2), (3, 8)), (runs(), (3, 6))):
        with pytest.raises(PrecisionError, match="the beginning of another run"):
            precision.quantize(model, words, tmp_path, other, source="tiny", bits=bit_widths, quiet=True)
    model.model.layers[0].self_attn.q_proj.weight.data.mul_(2)
    with pytest.raises(PrecisionError, match="the beginning of another run"):
        precision.quantize(model, words, tmp_path, runs(), source="tiny", quiet=True)


@pytest.mark.parametrize("file", ["layer-001.safetensors", "rest.safetensors", "config.json"])
@pytest.mark.parametrize("harm", ["cut", "altered", "gone"])
def test_a_damaged_folder_is_refused(stored: Path, tmp_path: Path, file: str, harm: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stored, folder)
    path = folder / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(content if harm == "altered" else content[: len(content) // 2])
    with pytest.raises(PrecisionError, match=file.replace(".", r"\.")):
        precision.load(folder)


def test_another_version_and_no_description_are_refused(stored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stored, folder)
    description = json.loads((folder / "millpond_precision.json").read_text())
    (folder / "millpond_precision.json").write_text(json.dumps({**description, "version": 7}))
    with pytest.raises(PrecisionError, match="format 7"):
        precision.load(folder)
    (folder / "millpond_precision.json").write_text(json.dumps({**description, "widths": [3, 6]}))
    with pytest.raises(PrecisionError, match="edited since it was written"):
        precision.load(folder)
    (folder / "millpond_precision.json").write_text("{")
    with pytest.raises(PrecisionError, match="cannot be read"):
        precision.load(folder)
    with pytest.raises(PrecisionError, match="holds no quantized model"):
        precision.load(tmp_path)


def test_a_damaged_calibration_is_refused(calibrated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(calibrated, folder)
    made = Calibration.load(folder)
    assert made is not None
    assert set(made.targets) == {3.5, 4.5}
    path = folder / "calibration.json"
    read = json.loads(path.read_text())
    some = next(iter(read["targets"]["3.5"].values()))
    some["threshold"] = 0.0
    path.write_text(json.dumps(read))
    with pytest.raises(PrecisionError, match="edited since it was written"):
        precision.load(folder, target_bits=3.5)
    path.write_text(json.dumps({**read, "sha256": "0"}))
    with pytest.raises(PrecisionError, match="run `millpond calibrate"):
        precision.load(folder, target_bits=3.5)
    path.write_text("[]")
    with pytest.raises(PrecisionError, match="run `millpond calibrate"):
        precision.load(folder)


def test_wrong_wishes_are_told(stored: Path, calibrated: Path) -> None:
    with pytest.raises(PrecisionError, match="has not been calibrated"):
        precision.load(stored, target_bits=4)
    with pytest.raises(PrecisionError, match="has not been calibrated"):  # what is missing, not what is too many
        precision.load(stored, target_bits=4, bits=4)
    with pytest.raises(PrecisionError, match="not both"):
        precision.load(calibrated, target_bits=3.5, bits=4)
    with pytest.raises(PrecisionError, match="3 to 8 bits, not 9"):
        precision.load(stored, bits=9)
    with pytest.raises(PrecisionError, match="at least one target"):
        precision.calibrate(stored, runs(), [], quiet=True)
    with pytest.raises(PrecisionError, match="between 3 and 6"):
        precision.calibrate(stored, runs(), [7.0], quiet=True)
    with pytest.raises(PrecisionError, match="at least 32 are needed"):
        precision.samples_of(tokenizer(), "w1 w2", samples=3, length=32)


@torch.no_grad()
def test_the_language_model_of_a_video_model(tmp_path: Path) -> None:
    family = tiny("qwen2_5_vl")
    folder = tmp_path / "model"
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        precision.quantize(family.model, family.tokenizer, folder, ids, source="tiny", quiet=True)
    model = precision.load(folder, bits=8)
    assert type(model) is type(family.model)
    # Eight bits are close; what is not quantized, the tower among it, is the same.
    want, got = family.model(ids).logits, model(ids).logits
    assert float((got - want).norm() / want.norm()) < 0.05
    for name, parameter in model.model.visual.named_parameters():
        assert torch.equal(parameter, family.model.model.visual.get_parameter(name))
    adapted = models.adapt(model, family.tokenizer)
    assert adapted.geometry == family.geometry


def test_decoders_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="separate q, k, v"):
        list(linears(torch.nn.Linear(2, 2)))
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 90,
    }
    for name in ("Olmo2", "Cohere2"):
        config = getattr(transformers, f"{name}Config")(**sizes, pad_token_id=0, num_key_value_heads=2)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        with pytest.raises(ModelError, match=f"{name}DecoderLayer cannot be quantized"):
            precision.quantize(model, tokenizer(), tmp_path / name, runs(), source="tiny", quiet=True)
        assert not (tmp_path / name).exists()


def test_widths_that_cannot_be_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match="between 3 and 8, not 2-4"):
        precision.quantize(text_model(), tokenizer(), tmp_path / "out", runs(), source="t", bits=(2, 4), quiet=True)
    assert not (tmp_path / "out").exists()


def test_gradients_reach_the_input_of_a_packed_model(stored: Path) -> None:
    for bits, count in ((5, 1), (5, 9)):  # from the planes, and as numbers
        packed, reference = precision.load(stored, bits=bits), dense(stored, bits)
        found = []
        for model in (packed, reference):
            x = torch.randn(1, count, 48, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
            model(inputs_embeds=x).logits.square().sum().backward()
            found.append(x.grad)
        assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-3 * float(found[1].abs().max()))


def test_a_packed_model_is_neither_copied_nor_saved_nor_cast_wrongly(stored: Path, tmp_path: Path) -> None:
    model = precision.load(stored, bits=4)
    with pytest.raises(PrecisionError, match=r"load .* again"):
        copy.deepcopy(model)
    with pytest.raises(PrecisionError, match="cannot be saved: copy"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    ids = runs(samples=1)[:, :1]
    want = model(ids).logits
    got = model.to(torch.bfloat16)(ids).logits.float()  # the tables stay what the kernels read
    assert float((got - want).norm() / want.norm()) < 0.1


def test_a_folder_keeps_the_names_of_its_format(stored: Path, calibrated: Path) -> None:
    written = json.loads((stored / "millpond_precision.json").read_text())
    assert set(written) == {"source", "widths", "layers", "columns", "files", "version", "seal"}
    assert (written["widths"], written["version"]) == ([3, 8], 2)
    decided = json.loads((calibrated / "calibration.json").read_text())
    assert set(decided) == {"version", "memory", "widths", "targets", "sha256", "seal"}
