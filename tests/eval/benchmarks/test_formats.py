"""Published files, as people have them on disk: what is asked about which video, when, in which words, and what is right."""

import json
from pathlib import Path

import pytest

from millpond.errors import MillpondError
from millpond.eval.benchmarks import BENCHMARKS, Query, get
from tests.eval.benchmarks import published


def read(name: str, root: Path, *extra: object) -> dict[str, Query]:
    """By id; everything must be there."""
    published.FOLDERS[name](root, extra)
    annotations = get(name).read(root)
    assert [fault.line for fault in annotations.faults] == []
    return {query.id: query for video in annotations.videos for query in video.queries}


def test_every_benchmark_has_a_folder_here() -> None:
    assert list(BENCHMARKS) == list(published.FOLDERS)


def test_mlvu_is_a_file_and_a_folder_a_task(tmp_path: Path) -> None:
    found = read("mlvu", tmp_path)
    assert {id: (query.task, query.truth["answer"], query.seconds) for id, query in found.items()} == {
        "plotQA/0": ("plotQA", "A", None),
        "plotQA/1": ("plotQA", "B", None),
        "count/0": ("count", "C", None),
    }
    asked = "Question: What colour?\nOptions:\n(A) Red\n(B) Blue\nOnly give the best option.\nBest option: ("
    assert found["plotQA/0"].prompt == asked
    # The same name lies in three folders; each task has its own.
    paths = {video.id: video.path.parent.name for video in get("mlvu").read(tmp_path).videos}
    assert paths == {"1_plotQA/a.mp4": "1_plotQA", "4_count/a.mp4": "4_count"}


def test_video_mme_is_rows_or_videos_with_questions(tmp_path: Path) -> None:
    found = read("video-mme", tmp_path)
    assert found["001-1"].prompt == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
        "(A, B, C, or D) of the correct option.\nWhich?\nA. Red.\nB. Blue.\nC. Green.\nD. None.\nThe best answer is:"
    )
    assert found["601-1"].truth == {"answer": "B", "length": "long"}
    rows = json.loads((tmp_path / "videomme" / "videomme.json").read_text())
    keys = ("videoID", "duration", "domain", "sub_category")
    nested = [{**{key: rows[0][key] for key in keys}, "questions": rows[:2]}, {**rows[2], "questions": [rows[2]]}]
    published.store(tmp_path / "videomme" / "videomme.json", nested)
    again = get("video-mme").read(tmp_path)
    assert {query.id: query for video in again.videos for query in video.queries} == found
    (tmp_path / "videomme" / "videomme.json").rename(tmp_path / "videomme" / "videomme.jsonl")
    (tmp_path / "videomme" / "videomme.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert get("video-mme").read(tmp_path).fingerprint == again.fingerprint


def test_video_mme_is_a_table_too(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    published.video_mme(tmp_path)
    path = tmp_path / "videomme" / "videomme.json"
    before = get("video-mme").read(tmp_path)
    parquet.write_table(
        arrow.Table.from_pylist(json.loads(path.read_text())), path.with_name("test-00000-of-00001.parquet")
    )
    path.unlink()
    assert get("video-mme").read(tmp_path).fingerprint == before.fingerprint


def test_a_table_without_its_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(MillpondError, match="pip install pyarrow"):
        get("video-mme").read(tmp_path)


def test_long_video_bench_has_candidates_or_options(tmp_path: Path) -> None:
    found = read("longvideobench", tmp_path)
    assert found["x_0"].prompt == (
        "Question: Which?\nA. r\nB. g\nC. b\nAnswer with the option's letter from the given choices directly."
    )
    assert found["x_0"].truth == {"options": 3, "seconds": "15", "answer": "C"}
    assert found["x_1"].truth == {"options": 2, "seconds": "3600", "answer": "A"}


def test_ego_schema_asks_those_with_public_answers(tmp_path: Path) -> None:
    found = read("egoschema", tmp_path)
    assert {id: query.truth["answer"] for id, query in found.items()} == {"uid-a": "D", "uid-b": "A"}
    (tmp_path / "subset_answers.json").unlink()
    everything = [query for video in get("egoschema").read(tmp_path).videos for query in video.queries]
    assert [(query.id, "answer" in query.truth) for query in everything] == [(f"uid-{c}", False) for c in "abc"]


def test_ovo_bench_is_asked_at_its_moments(tmp_path: Path) -> None:
    found = read("ovo-bench", tmp_path)
    asked = {id: (query.task, query.seconds, query.truth["answer"]) for id, query in found.items()}
    assert asked == {
        "0": ("EPM", 5.0, "A"),
        "1": ("OCR", 2.4, "B"),
        "2_0": ("REC", 3.0, "2"),
        "3_0": ("SSR", 2.0, "No"),
        "3_1": ("SSR", 4.5, "Yes"),
        "4_0": ("CRR", 1.0, "Yes"),
    }
    assert "Options:\nA. x; B. y; C. z;\n" in found["0"].prompt
    assert "How many times did they jump?" in found["2_0"].prompt
    # All of one video in one pass, in the order of asking.
    assert [[query.id for query in video.queries] for video in get("ovo-bench").read(tmp_path).videos] == [
        ["4_0", "1", "0"],
        ["3_0", "2_0", "3_1"],
    ]


def test_ovo_bench_goes_with_clips_where_the_videos_are_not_there(tmp_path: Path) -> None:
    found = read("ovo-bench", tmp_path)
    for path in (tmp_path / "src_videos").rglob("*.mp4"):
        path.unlink()
    for id in found:
        published.clip(tmp_path / "chunked_videos" / f"{id}.mp4", seconds=1)
    clips = get("ovo-bench").read(tmp_path)
    assert {video.path.stem: [(query.id, query.seconds) for query in video.queries] for video in clips.videos} == {
        id: [(id, None)] for id in found
    }


def test_streaming_bench_is_whichever_parts_are_there(tmp_path: Path) -> None:
    found = read("streamingbench", tmp_path)
    real = {id: (query.seconds, query.truth["answer"]) for id, query in found.items() if id.startswith("real")}
    assert real == {"real/0/0": (4, "C"), "real/1/0": (2, "A")}
    assert found["real/0/0"].prompt.endswith(
        "Question: Which?\n\nOptions:\nA. r\nB. g\nC. b\nD. k\n\nThe best option is:"
    )
    # The second of a sequence is told the first and its right answer.
    told = "At timestamp 00:00:02, the following question and answer occurred: Question: Which?; Options: A. r, B. g, C. b, D. k; Answer: B; "
    assert told not in found["sqa/0/0"].prompt
    assert told in found["sqa/0/1"].prompt
    polls = [query.seconds for query in found.values() if query.id.startswith("proactive") and not query.after_yes]
    assert polls == [2, 3, 4, 5, 6, 7]
    assert found["proactive/0/0/3/output"].after_yes == "proactive/0/0/3"
    (tmp_path / "questions_sqa.json").unlink()
    (tmp_path / "questions_proactive.json").unlink()
    assert [video.id for video in get("streamingbench").read(tmp_path).videos] == ["s1_real.mp4"]


def test_rvs_is_asked_at_the_end_of_each_turn(tmp_path: Path) -> None:
    found = read("rvs-ego", tmp_path)
    assert [(id, query.seconds, query.prompt) for id, query in found.items()] == [
        ("v1/1", 2.0, "And where?"),
        ("v1/0", 5.0, "What is it?"),
    ]


BROKEN = {
    "mlvu": {"video": "a.mp4", "question": "What colour?", "candidates": ["Red", "Blue"], "answer": "Green"},
    "video-mme": {
        "videoID": "ytshort",
        "question_id": "9",
        "question": "?",
        "options": ["A. a", "B. b"],
        "answer": "E",
    },
    "longvideobench": {"id": "x_9", "video_path": "x.mp4", "question": "?", "candidates": ["a"], "correct_choice": 0},
    "egoschema": {"q_uid": "uid-a", "question": ["no text"]},
    "ovo-bench": {
        "id": 9,
        "task": "EPM",
        "video": "COIN/one.mp4",
        "realtime": "soon",
        "question": "?",
        "options": ["a", "b"],
        "gt": 0,
    },
    "streamingbench": {"video_path": "s1_real.mp4", "questions": [published._asked("Counting", "at noon", "A")]},
    "rvs-ego": {"video_id": "v9", "video_path": "v1.mp4", "conversations": []},
    "rvs-movie": "not even an object",
}


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_a_row_that_says_nothing_usable_is_told_and_the_others_stay(tmp_path: Path, name: str) -> None:
    whole = read(name, tmp_path)
    published.FOLDERS[name](tmp_path, [BROKEN[name]])
    annotations = get(name).read(tmp_path)
    (fault,) = annotations.faults
    assert fault.kind == "malformed row"
    assert ", row " in fault.line
    assert "\n" not in fault.line
    assert {query.id for video in annotations.videos for query in video.queries} == set(whole)


def test_a_missing_video_is_told_with_what_is_lost(tmp_path: Path) -> None:
    published.ovo_bench(tmp_path)
    before = get("ovo-bench").read(tmp_path)
    (tmp_path / "src_videos" / "COIN" / "one.mp4").unlink()
    after = get("ovo-bench").read(tmp_path)
    assert [(fault.kind, fault.line, fault.questions) for fault in after.faults] == [
        ("missing video", "there is no video COIN/one.mp4", 3)
    ]
    # Who has fewer videos is asked the same questions.
    assert after.fingerprint == before.fingerprint
    assert len(after.videos) == 1


def test_two_videos_of_one_name_are_told_apart_by_their_folder_or_not_at_all(tmp_path: Path) -> None:
    published.rvs_ego(tmp_path)
    published.clip(tmp_path / "other" / "v1.mp4", seconds=1)
    (video,) = get("rvs-ego").read(tmp_path).videos
    assert video.path == tmp_path / "ego" / "videos" / "v1.mp4"
    (tmp_path / "ego" / "videos").rename(tmp_path / "ego" / "films")
    (fault,) = get("rvs-ego").read(tmp_path).faults
    assert fault.line == "the video data/rvs/ego/videos/v1.mp4 may be one of 2, in ego/films, other"


def test_a_question_that_appears_twice_is_asked_once(tmp_path: Path) -> None:
    published.ego_schema(tmp_path)
    rows = json.loads((tmp_path / "questions.json").read_text())
    published.store(tmp_path / "questions.json", [*rows, rows[0]])
    (fault,) = get("egoschema").read(tmp_path).faults
    assert fault.line == "questions.json, row 4: the question uid-a appears twice"


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_a_folder_without_annotations_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(MillpondError, match="there is no "):
        get(name).read(tmp_path)
    with pytest.raises(MillpondError, match="there is no folder"):
        get(name).read(tmp_path / "nowhere")


def test_a_file_that_is_no_json_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "ovo_bench_new.json").write_text("[{")
    with pytest.raises(MillpondError, match=r"cannot read .*ovo_bench_new.json"):
        get("ovo-bench").read(tmp_path)
    (tmp_path / "ovo_bench_new.json").write_text("{}")
    with pytest.raises(MillpondError, match="must hold a list of rows"):
        get("ovo-bench").read(tmp_path)


def test_paths_of_annotations_do_not_leave_the_folder(tmp_path: Path) -> None:
    published.clip(tmp_path / "outside.mp4", seconds=1)
    for name in ("../outside.mp4", str(tmp_path / "outside.mp4")):
        published.ovo_bench(tmp_path / "data")
        row = {"id": 9, "task": "REC", "video": name, "activity": "run", "test_info": [{"realtime": 1, "count": 0}]}
        published.ovo_bench(tmp_path / "data", [row])
        (fault,) = get("ovo-bench").read(tmp_path / "data").faults
        assert fault.kind == "missing video"
