"""lmms-eval's own command line, end to end, with millpond as its model: in an environment of its own (`make interop`)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.published import clip

pytest.importorskip("lmms_eval")

TASK = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
task: {name}
test_split: test
output_type: {kind}
doc_to_visual: !function answers.visual
doc_to_text: !function answers.{text}
doc_to_target: answer
process_results: !function answers.{score}
generation_kwargs: {{max_new_tokens: 4{more}}}
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """
def visual(doc):
    return [doc["video"]]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def rounds(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    told = {"before": list(previous_output), "round": round_idx, "info": previous_round_info}
    return [doc["video"]], "And " + doc["question"], round_idx == 3, previous_output, told


def once(doc, results):
    return {"right": float(isinstance(results[0], str) and bool(results[0]))}


def thrice(doc, results):
    said = results[0] if isinstance(results[0], list) else results
    return {"right": float(len(said) == 3)}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks about one film."""
    root = tmp_path_factory.mktemp("tasks")
    film = str(clip(root / "film.mp4", seconds=4))
    rows = [{"video": film, "question": f"What is on screen {word}?", "answer": "x"} for word in ("now", "then")]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "answers.py").write_text(FUNCTIONS)
    write(root, "film_once", "generate_until", "question", "once")
    write(root, "film_rounds", "generate_until_multi_round", "rounds", "thrice")
    write(root, "film_sampled", "generate_until", "question", "once", ", do_sample: true, temperature: 0.7")
    return root


def write(root: Path, name: str, kind: str, text: str, score: str, more: str = "") -> None:
    given = TASK.format(rows=root / "rows.jsonl", name=name, kind=kind, text=text, score=score, more=more)
    (root / f"{name}.yaml").write_text(given)


def evaluate(tasks: Path, out: Path, task: str, arguments: str) -> subprocess.CompletedProcess[str]:
    words = ["--model", "millpond", "--model_args", arguments, "--tasks", task, "--include_path", str(tasks)]
    words += ["--batch_size", "1", "--output_path", str(out), "--log_samples"]
    environment = {**os.environ, "HF_HOME": str(out / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "lmms_eval", *words],
        env=environment | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def scores(out: Path, task: str) -> dict[str, Any]:
    (path,) = out.rglob("*_results.json")
    found: dict[str, Any] = json.loads(path.read_text())["results"][task]
    return found


@pytest.mark.parametrize("task", ["film_once", "film_rounds"])
def test_their_command_runs_to_its_score(tmp_path: Path, tasks: Path, task: str) -> None:
    done = evaluate(tasks, tmp_path, task, "pretrained=minnow,budget=1MiB,policy=keydiff,device=cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert scores(tmp_path, task)["right,none"] == 1.0


@pytest.mark.parametrize(
    ("task", "arguments", "line"),
    [
        ("film_once", "pretrained=minnow,budget=1MiB,polcy=keydiff", "no model argument 'polcy'"),
        ("film_once", "pretrained=minnow,budget=1MiB,policy=wisdom", "no policy is called 'wisdom'"),
        ("film_sampled", "pretrained=minnow,budget=1MiB", "do_sample cannot be True"),
    ],
)
def test_a_wrong_option_is_refused_by_name(tmp_path: Path, tasks: Path, task: str, arguments: str, line: str) -> None:
    done = evaluate(tasks, tmp_path, task, arguments)
    assert line in done.stderr + done.stdout
    assert not [*tmp_path.rglob("*_results.json")]


def test_their_list_of_models_has_ours_and_theirs() -> None:
    from lmms_eval.models import MODEL_REGISTRY_V2

    names = MODEL_REGISTRY_V2.list_model_names()
    assert "millpond" in names
    assert len(names) > 20
    assert MODEL_REGISTRY_V2.get_model_class("millpond").is_simple is False
