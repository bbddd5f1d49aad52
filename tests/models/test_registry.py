"""From a name or a folder to an adapter, and every way in which that fails."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from millpond import ModelError, Session
from millpond.models import Supported, adapt, load, supported
from tests.cache.text_model import text_model
from tests.models.tiny import FAMILIES, tiny


def saved(name: str, folder: Path) -> Path:
    family = tiny(name)
    family.model.save_pretrained(folder)
    family.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


def copy(folder: Path, into: Path, **changed: str | None) -> Path:
    """A copy of a model's folder with files changed, added or (None) left out; `_` stands for the dot."""
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    for name, content in changed.items():
        path = into / ".".join(name.rsplit("_", 1))
        path.unlink() if content is None else path.write_text(content)
    return into


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_loads_as_it_was(name: str, tmp_path: Path) -> None:
    before, after = tiny(name), load(saved(name, tmp_path))
    assert type(after) is type(before)
    assert after.opening() == before.opening()
    assert after.stop_ids == before.stop_ids
    assert not after.model.training
    want = before.model.state_dict()
    assert all(torch.equal(weight, want[key]) for key, weight in after.model.state_dict().items())


def test_supported_rows_name_every_adapter() -> None:
    assert supported()[0] == Supported("qwen2_vl", "Qwen2-VL", "Qwen2VL")
    assert [row.model_type for row in supported()] == list(FAMILIES)
    for row in supported():
        assert type(tiny(row.model_type)).__name__ == row.adapter


def test_options_reach_the_model(qwen: Path) -> None:
    family = load(str(qwen), dtype="bfloat16", device="cpu", attn_implementation="eager")
    assert family.geometry.dtype == torch.bfloat16
    assert family.model.config._attn_implementation == "eager"
    assert load(qwen, dtype=torch.float16).geometry.dtype == torch.float16
    assert load(qwen).geometry.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "'int8' is not a floating point type"),
        ({"dtype": "nonsense"}, "'nonsense' is not a floating point type"),
        ({"device": "nowhere"}, "cannot move the model to 'nowhere'"),
        ({"attn_implementation": "nonsense"}, "cannot load the model at"),
    ],
)
def test_options_that_cannot_be(qwen: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load(qwen, **options)
    assert "\n" not in str(caught.value)


def test_pixels_numbers_are_found_in_every_kind_of_checkpoint(qwen: Path, tmp_path: Path) -> None:
    def numbers(most: int, kind: str) -> dict[str, Any]:
        return {"max_pixels": most, f"{kind}_processor_type": "Any"}

    video, still = json.dumps(numbers(14000, "video")), json.dumps(numbers(15000, "image"))
    both = json.dumps({"video_processor": numbers(16000, "video"), "image_processor": numbers(17000, "image")})
    one = json.dumps({"image_processor": numbers(18000, "image")})
    cases: list[tuple[dict[str, str | None], int]] = [
        ({}, 768 * 14 * 14),
        ({"processor_config_json": one}, 18000),
        ({"processor_config_json": one, "preprocessor_config_json": still}, 15000),
        ({"processor_config_json": both, "preprocessor_config_json": still}, 16000),
        ({"processor_config_json": both, "video_preprocessor_config_json": video}, 14000),
    ]
    for index, (files, most) in enumerate(cases):
        folder = tmp_path / str(index)
        folder.mkdir()
        assert load(copy(qwen, folder, **files)).max_pixels == most  # type: ignore[attr-defined]


def test_a_processors_numbers_are_used() -> None:
    family = tiny("qwen2_5_vl")

    def processor(**parts: Any) -> SimpleNamespace:
        return SimpleNamespace(tokenizer=family.tokenizer, chat_template=family.tokenizer.chat_template, **parts)

    numbers = SimpleNamespace(to_dict=lambda: {"max_pixels": 14000, "image_processor_type": "Any"})
    others = SimpleNamespace(to_dict=lambda: {"max_pixels": 13000, "video_processor_type": "Any"})
    assert adapt(family.model, processor(image_processor=numbers)).max_pixels == 14000  # type: ignore[attr-defined]
    both = processor(image_processor=numbers, video_processor=others)
    assert adapt(family.model, both).max_pixels == 13000  # type: ignore[attr-defined]
    assert adapt(family.model, both, {"max_pixels": 12000}).max_pixels == 12000  # type: ignore[attr-defined]


def test_older_checkpoints_keep_the_template_in_a_json(qwen: Path, tmp_path: Path) -> None:
    template = (qwen / "chat_template.jinja").read_text()
    folder = copy(qwen, tmp_path, chat_template_jinja=None, chat_template_json=json.dumps({"chat_template": template}))
    assert load(folder).opening() == load(qwen).opening()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config_json": None}, "cannot read the model in"),
        ({"config_json": "{nonsense"}, "cannot read the model in .*not a valid JSON"),
        ({"config_json": "{}"}, "cannot read the model in"),
        ({"config_json": '{"model_type": "never-heard-of"}'}, "never-heard-of"),
        (
            {"config_json": '{"model_type": "bert"}'},
            "'bert' is not supported; there are: qwen2_vl, qwen2_5_vl, qwen3_vl",
        ),
        ({"model_safetensors": None}, "cannot load the model at"),
        ({"model_safetensors": "short"}, "cannot load the model at"),
        ({"preprocessor_config_json": "[1"}, "cannot load the model at"),
        ({"preprocessor_config_json": "[1]"}, "preprocessor_config.json is not a JSON object"),
        ({"chat_template_jinja": None}, "has no chat template"),
    ],
)
def test_damaged_folders(qwen: Path, tmp_path: Path, changed: dict[str, str | None], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load(copy(qwen, tmp_path, **changed))
    assert "\n" not in str(caught.value)


def test_a_cut_off_weights_file(qwen: Path, tmp_path: Path) -> None:
    weights = copy(qwen, tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load the model at"):
        load(tmp_path)


def test_weights_that_are_missing_are_not_made_up(qwen: Path, tmp_path: Path) -> None:
    weights = copy(qwen, tmp_path) / "model.safetensors"
    kept = {key: weight for key, weight in load_file(weights).items() if "layers.1" not in key}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"the weights are incomplete: 12 are missing, first .*layers\.1"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["no/such-model", "no-such-model", "/no/such/folder", ""])
def test_no_model_at_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_minnow_is_the_model_that_ships(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millpond.minnow.folder", lambda: qwen)
    assert load("minnow").opening() == load(qwen).opening()


def test_an_unsupported_family_lists_the_supported_ones() -> None:
    with pytest.raises(ModelError, match=r"'qwen2' is not supported; there are: qwen2_vl, qwen2_5_vl"):
        adapt(text_model(), None)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length_are_refused(kind: str) -> None:
    family = tiny("llava_onevision")
    family.model.config.get_text_config().rope_parameters["rope_type"] = kind
    with pytest.raises(ModelError, match=f"'{kind}' depend on the length"):
        adapt(family.model, family.tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_weights_a_plan_is_the_same(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    whole, empty = load(folder), load(folder, weights=False)
    assert all(weight.is_meta for weight in empty.model.parameters())
    assert empty.geometry == whole.geometry
    assert empty.opening() == whole.opening()
    assert empty.grid(112, 168) == whole.grid(112, 168)
    assert torch.equal(empty.rope.inv_freq, whole.rope.inv_freq)
    plans = [Session(family, budget="8MiB").plan_for(112, 168) for family in (whole, empty)]
    assert plans[0] == plans[1]


def test_fewer_pixels_cost_fewer_tokens_where_frames_keep_their_shape(qwen: Path, tmp_path: Path) -> None:
    most = load(qwen).grid(448, 448)
    few = load(qwen, max_pixels=112 * 112)
    assert few.grid(448, 448).height * few.grid(448, 448).width <= 112 * 112
    assert few.grid(448, 448).tokens < most.tokens
    with pytest.raises(ModelError, match="max_pixels does not apply"):
        load(saved("llava_onevision", tmp_path), max_pixels=112 * 112)
