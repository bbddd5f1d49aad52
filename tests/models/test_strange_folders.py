"""Folders from strangers: nothing in them runs, nobody is asked, nothing outside them is read, and each gets one clear line."""

import ast
import json
import pickle
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import millpond
from millpond import ModelError
from millpond.cli.precision import _load as load_to_quantize
from millpond.models import adapt, load
from millpond.precision import load as load_quantized
from tests.models.tiny import tiny


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llava_next_video", tmp_path_factory.mktemp("llava"))


def saved(name: str, folder: Path) -> Path:
    family = tiny(name)
    family.model.save_pretrained(folder)
    family.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any question, and any look at the network, is a failure, though the hub may be used."""

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"asked for {args}")

    monkeypatch.setattr("builtins.input", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def changed(folder: Path, into: Path, file: str = "config.json", **values: Any) -> Path:
    """A copy of a folder in which a JSON file says something else; `part__name` names a value within a part, `...` takes one out."""
    if folder != into:
        shutil.copytree(folder, into, dirs_exist_ok=True)
    path = into / file
    said = json.loads(path.read_text()) if path.exists() else {}
    for name, value in values.items():
        *parts, last = name.split("__")
        where = said
        for part in parts:
            where = where[part]
        if value is ...:
            del where[last]
        else:
            where[last] = value
    path.write_text(json.dumps(said))
    return into


def refused(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


EVIL = "from pathlib import Path\n\nPath(__file__).with_name('ran').touch()\n\nclass Evil:\n    pass\n"


def test_code_in_a_folder_never_runs(qwen: Path, tmp_path: Path) -> None:
    code = {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    alien = changed(qwen, tmp_path / "alien", model_type="evil", auto_map=code)
    known = changed(qwen, tmp_path / "known", auto_map=code)
    changed(known, known, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    for folder in (alien, known):
        (folder / "evil.py").write_text(EVIL)
    refused(alien, "'evil' .* comes with code of its own, which millpond never runs")
    refused(alien, "which millpond never runs", weights=False)
    with pytest.raises(ModelError, match="which millpond never runs"):
        load_to_quantize(str(alien))
    assert load(known).opening() == load(qwen).opening()
    assert not any((folder / "ran").exists() for folder in (alien, known))


def test_whatever_loads_a_checkpoint_does_so_safely() -> None:
    """Every call of `from_pretrained` of transformers takes the arguments that keep a stranger's code out."""
    calls = [
        ast.unparse(node)
        for file in Path(millpond.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and re.search(r"^(transformers\.|auto)\S*from_pretrained$", ast.unparse(node.func))
    ]
    assert len(calls) >= 6
    assert [call for call in calls if "**safely(" not in call] == []


def test_pickled_weights_are_refused(qwen: Path, tmp_path: Path) -> None:
    folder = changed(qwen, tmp_path)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    refused(folder, "cannot load the model at .*safetensors")
    with pytest.raises(ModelError, match="safetensors"):
        load_to_quantize(str(folder))


def test_a_pickle_under_another_name_is_not_opened(qwen: Path, tmp_path: Path) -> None:
    folder = changed(qwen, tmp_path)
    (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    refused(folder, "cannot load the model at")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "a/../../b.safetensors", "", 3])
def test_an_index_names_files_of_its_own_folder_only(qwen: Path, tmp_path: Path, name: Any) -> None:
    folder = changed(qwen, tmp_path / "folder")
    weights = folder / "model.safetensors"
    save_file(load_file(weights), tmp_path / "outside.safetensors", metadata={"format": "pt"})
    held = load_file(weights)
    weights.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(held, name)}))
    refused(folder, "names a file outside itself")
    with pytest.raises(ModelError, match="names a file outside itself"):
        load_to_quantize(str(folder))


def test_weights_in_two_files_load(qwen: Path, tmp_path: Path) -> None:
    folder = changed(qwen, tmp_path)
    weights = folder / "model.safetensors"
    held = load_file(weights)
    weights.unlink()
    names = {key: f"part-{index % 2}.safetensors" for index, key in enumerate(held)}
    for file in set(names.values()):
        save_file({key: held[key] for key in held if names[key] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    want = load(qwen).model.state_dict()
    assert all(torch.equal(weight, want[key]) for key, weight in load(folder).model.state_dict().items())


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"transformers_weights": "../a.safetensors"}, "names a file outside itself"),
        ("tokenizer_config.json", {"tokenizer_file": "/etc/passwd"}, "names a file outside itself"),
        ("adapter_config.json", {"base_model_name_or_path": "some/where"}, "an adapter of another model"),
        ("config.json", {"attn_implementation": "some/kernel"}, "asks for code from elsewhere"),
        ("config.json", {"text_config___attn_implementation": {"": "some/kernel"}}, "asks for code from elsewhere"),
        ("config.json", {"text_config": None}, "incomplete: its text_config is null"),
        ("config.json", {"vision_config": []}, r"incomplete: its vision_config is \[\]"),
        (
            "config.json",
            {"text_config__num_hidden_layers": 10**6},
            "num_hidden_layers 1000000: it must lie between 1 and 512",
        ),
        ("config.json", {"text_config__num_attention_heads": 0}, "num_attention_heads 0: it must lie"),
        ("config.json", {"text_config__num_key_value_heads": 3}, "shares 3 KV heads among 4 heads"),
        ("config.json", {"text_config__hidden_size": "64"}, 'hidden_size "64": it must lie'),
        ("config.json", {"vision_config__depth": 1e9}, "depth 1000000000.0: it must lie"),
        (
            "config.json",
            {"text_config__rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "mrope_section None",
        ),
        ("config.json", {"text_config__hidden_size": 1 << 16}, "describes [0-9]+ weights, its files hold [0-9]+"),
        ("config.json", {"vision_config__depth": 30}, "describes [0-9]+ weights, its files hold"),
        ("tokenizer.json", {"model": {"type": "Nonsense"}}, "cannot load the model at"),
        ("tokenizer_config.json", {"added_tokens_decoder": 5}, "cannot load the model at"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, r"image_mean must be three numbers, not \[0.5\]"),
        ("preprocessor_config.json", {"image_std": [0, 1, 1]}, "image_std must be three numbers"),
        ("preprocessor_config.json", {"size": 224}, "size must name its edges, not be 224"),
        ("preprocessor_config.json", {"max_pixels": "many"}, "cannot load the model at"),
    ],
)
def test_what_a_folder_says_is_checked(
    qwen: Path, tmp_path: Path, file: str, values: dict[str, Any], message: str
) -> None:
    refused(changed(qwen, tmp_path, file, **values), message)


def test_a_part_that_is_left_out_is_not_made_up(llava: Path, tmp_path: Path) -> None:
    """transformers fills in a language model of seven billion weights."""
    refused(changed(llava, tmp_path, text_config=...), "describes [0-9]{10} weights, its files hold [0-9]{6}$")


def test_pixels_of_a_file_are_capped_also_where_it_names_no_processor(qwen: Path, tmp_path: Path) -> None:
    folder = changed(qwen, tmp_path, "preprocessor_config.json", min_pixels=10**12, max_pixels=10**12)
    family = load(folder)
    assert family.grid(1000, 1000).tokens <= 768


def test_a_tokenizer_with_more_ids_than_the_model_is_refused() -> None:
    family = tiny("qwen2_5_vl")
    family.tokenizer.add_tokens(["<more>"])
    family.tokenizer.chat_template = family.tokenizer.chat_template.replace("<|im_start|>assistant", "<more>")
    with pytest.raises(ModelError, match="writes a chat with id 263, the model knows 263 ids"):
        adapt(family.model, family.tokenizer)


def test_a_quantized_folder_is_no_exception(qwen: Path, tmp_path: Path) -> None:
    from millpond.precision.folder import Description, digest

    folder = changed(qwen, tmp_path, model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    (folder / "evil.py").write_text(EVIL)
    Description("x", (2, 4), 3, files={"config.json": digest(folder / "config.json")}).save(folder)
    with pytest.raises(ModelError, match="which millpond never runs"):
        load_quantized(folder)
    refused(folder, "which millpond never runs")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("device", ["meta", "meta:0"])
def test_nothing_runs_on_meta(qwen: Path, device: str) -> None:
    refused(qwen, "nothing can be computed there", device=device)
