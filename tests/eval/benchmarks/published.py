"""Small folders of the shape that each benchmark is published in, with real MP4 files, all made here."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from millpond.frames import write_mp4

FPS = 2


def clip(path: Path, seconds: float = 6.0) -> Path:
    """A film of noise, 64 x 64 at two frames a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path.name))).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    write_mp4(path, ((at / FPS, pixels[at % 8]) for at in range(round(seconds * FPS))), fps=FPS)
    return path


def store(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def mlvu(root: Path, extra: Sequence[Any] = ()) -> None:
    row = {"video": "a.mp4", "duration": 6, "question": "What colour?", "candidates": ["Red", "Blue"]}
    plots = [{**row, "answer": "Red", "question_type": "plotQA"}, {**row, "answer": "Blue", "question_type": "plotQA"}]
    store(root / "json" / "1_plotQA.json", [*plots, *extra])
    counts = [{**row, "candidates": ["1", "2", "3", "4"], "answer": "3", "question_type": "count"}]
    store(root / "json" / "4_count.json", counts)
    store(root / "json" / "9_summary.json", [{"video": "a.mp4", "question": "Summarise.", "answer": "A film."}])
    for task in ("1_plotQA", "4_count", "9_summary"):
        clip(root / "video" / task / "a.mp4")


def _mme(name: str, duration: str, task: str, answer: str) -> dict[str, Any]:
    options = ["A. Red.", "B. Blue.", "C. Green.", "D. None."]
    shared = {"videoID": f"yt{duration}", "duration": duration, "domain": "Knowledge", "sub_category": "Law"}
    return {
        **shared,
        "question_id": name,
        "task_type": task,
        "question": "Which?",
        "options": options,
        "answer": answer,
    }


def video_mme(root: Path, extra: Sequence[Any] = ()) -> None:
    rows = [_mme("001-1", "short", "Counting Problem", "C"), _mme("001-2", "short", "OCR Problems", "A")]
    rows.append(_mme("601-1", "long", "Counting Problem", "B"))
    store(root / "videomme" / "videomme.json", [*rows, *extra])
    clip(root / "data" / "ytshort.mp4")
    clip(root / "data" / "ytlong.mkv.mp4").rename(root / "data" / "ytlong.mkv")


def long_video_bench(root: Path, extra: Sequence[Any] = ()) -> None:
    row = {"video_path": "x.mp4", "question": "Which?", "subtitle_path": "x.json", "duration": 6.0}
    first = {**row, "id": "x_0", "candidates": ["r", "g", "b"], "correct_choice": 2, "duration_group": 15}
    second = {**row, "id": "x_1", "option0": "r", "option1": "g", "option2": "N/A", "correct_choice": 0}
    rows = [
        {**first, "question_category": "T2E"},
        {**second, "duration_group": 3600, "question_category": "S2O"},
    ]
    store(root / "lvb_val.json", [*rows, *extra])
    clip(root / "videos" / "x.mp4")


def ego_schema(root: Path, extra: Sequence[Any] = ()) -> None:
    rows = [
        {"q_uid": f"uid-{name}", "question": "Why?", **{f"option {place}": f"because of {place}" for place in range(5)}}
        for name in "abc"
    ]
    store(root / "questions.json", [*rows, *extra])
    store(root / "subset_answers.json", {"uid-a": 3, "uid-b": 0})
    for name in "abc":
        clip(root / "videos" / f"uid-{name}.mp4")


def ovo_bench(root: Path, extra: Sequence[Any] = ()) -> None:
    first, second = "COIN/one.mp4", "Ego4D/clips/two.mp4"
    choice = {"question": "Which?", "answer": "x", "options": ["x", "y", "z"]}
    steps = [{"realtime": 2, "step": "tie", "type": 0}, {"realtime": 4.5, "step": "tie", "type": 1}]
    rows = [
        {"id": 0, "task": "EPM", "video": first, "realtime": 5, **choice, "gt": 0},
        {"id": 1, "task": "OCR", "video": first, "realtime": 2.4, **choice, "gt": 1},
        {"id": 2, "task": "REC", "video": second, "activity": "jump", "test_info": [{"realtime": 3, "count": 2}]},
        {"id": 3, "task": "SSR", "video": second, "tutorial": "Knot", "test_info": steps},
        {"id": 4, "task": "CRR", "video": first, "question": "Who?", "test_info": [{"realtime": 1, "type": 1}]},
    ]
    store(root / "data" / "ovo_bench_new.json", [*rows, *extra])
    clip(root / "src_videos" / first)
    clip(root / "src_videos" / second)


def _asked(
    task: str, stamp: str, answer: str, options: Sequence[str] = ("A. r", "B. g", "C. b", "D. k")
) -> dict[str, Any]:
    return {"task_type": task, "question": "Which?", "time_stamp": stamp, "answer": answer, "options": [*options]}


def streaming_bench(root: Path, extra: Sequence[Any] = ()) -> None:
    def of(name: str, *questions: dict[str, Any]) -> dict[str, Any]:
        return {"time": "[0:00:00 - 0:00:10]", "questions": [*questions], "video_path": f"/home/them/videos/{name}.mp4"}

    real = [
        of("s1_real", _asked("Counting", "00:00:04", "C")),
        of("s1_real", _asked("Object Recognition", "00:02", "A")),
    ]
    store(root / "questions_real.json", [*real, *extra])
    bare = ("r", "g", "b", "k")
    turns = [
        of("s1_sqa", _asked("Sequential Question Answering", stamp, "B", bare)) for stamp in ("00:00:02", "00:00:05")
    ]
    store(root / "questions_sqa.json", [turns])
    output = {"task_type": "Proactive Output", "question": 'When red, output "3".', "ground_truth_output": "3"}
    store(
        root / "questions_proactive.json",
        [of("s1_pro", {**output, "time_stamp": "00:00:01", "ground_truth_time_stamp": "00:00:03"})],
    )
    for name in ("s1_real", "s1_sqa", "s1_pro"):
        clip(root / "videos" / f"{name}.mp4")


def rvs_ego(root: Path, extra: Sequence[Any] = ()) -> None:
    def turn(question: str, kind: str, end: float) -> dict[str, Any]:
        return {"question": question, "answer": "a cup", "answer_type": kind, "start_time": 0, "end_time": end}

    turns = [turn("What is it?", "Object", 5), turn("And where?", "Place", 2)]
    row = {"video_id": "v1", "video_path": "data/rvs/ego/videos/v1.mp4", "conversations": turns}
    store(root / "ego" / "ego4d_oe.json", [row, *extra])
    clip(root / "ego" / "videos" / "v1.mp4")


def rvs_movie(root: Path, extra: Sequence[Any] = ()) -> None:
    rvs_ego(root, extra)
    (root / "ego" / "ego4d_oe.json").rename(root / "ego" / "movienet_oe.json")


FOLDERS = {
    "mlvu": mlvu,
    "video-mme": video_mme,
    "longvideobench": long_video_bench,
    "egoschema": ego_schema,
    "ovo-bench": ovo_bench,
    "streamingbench": streaming_bench,
    "rvs-ego": rvs_ego,
    "rvs-movie": rvs_movie,
}
