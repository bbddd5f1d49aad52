"""Each benchmark's own rule for reading an answer, and its own figures."""

from pathlib import Path

import pytest

from millpond.eval.benchmarks import Answered, get
from millpond.eval.benchmarks.base import Score, Verdict
from millpond.eval.benchmarks.letters import before_bracket, drawn, first_of_abcd, first_of_abcde, named_choice
from tests.eval.benchmarks import published


def scored(name: str, root: Path, texts: dict[str, str], verdicts: dict[str, Verdict] | None = None) -> Score:
    """Of answers by the id of their question, the others not given."""
    published.FOLDERS[name](root)
    asked = {query.id: query for video in get(name).read(root).videos for query in video.queries}
    return get(name).score([Answered(asked[id], text, (verdicts or {}).get(id)) for id, text in texts.items()])


def parts(score: Score) -> dict[str, tuple[float, int]]:
    return {name: (round(part.value, 2), part.questions) for name, part in score.parts.items()}


@pytest.mark.parametrize(
    ("answer", "choice"),
    [("B", "B"), (" (B) Blue", "B"), ("B) Blue", "B"), ("B.", "B."), ("Blue", "Blue"), (") B", "")],
)
def test_mlvu_reads_in_front_of_the_bracket(answer: str, choice: str) -> None:
    assert before_bracket(answer) == choice


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("C. Berries.", "C"),
        ("The best answer is D", "D"),
        ("Answer: A", "A"),
        ("Best option: C", "B"),  # the authors' list lacks a comma there
        ("it is c", ""),
        ("", ""),
    ],
)
def test_video_mme_reads_the_first_capital(answer: str, choice: str) -> None:
    assert first_of_abcd(answer) == choice


def test_long_video_bench_reads_the_first_capital_or_draws() -> None:
    assert first_of_abcde("The best option is E", "x", "ABCDE") == ("E", True)
    assert first_of_abcde("none", "x", "ABC") == (drawn("x", "ABC"), False)
    assert {drawn(f"id {number}", "ABCDE") for number in range(100)} == set("ABCDE")


@pytest.mark.parametrize(
    ("answer", "choice", "found"),
    [
        ("(B)", "B", True),
        ("C. because of it", "C", True),
        ("D", "D", True),
        ("I think that it is plainly because of 4", "E", True),
        ("(B) or (A)", "B", True),
    ],
)
def test_ego_schema_reads_the_choice_that_is_named_first(answer: str, choice: str, found: bool) -> None:
    assert named_choice(answer, "x", [f"because of {place}" for place in range(5)]) == (choice, found)


def test_ego_schema_draws_where_none_is_named(tmp_path: Path) -> None:
    options = [f"because of {place}" for place in range(5)]
    assert named_choice("no idea", "x", options) == (drawn("x", "ABCDE"), False)
    score = scored("egoschema", tmp_path, {"uid-a": "(D)", "uid-b": "B"})
    assert (score.total, score.unreadable) == (50.0, 0)


def test_mlvu_is_the_mean_of_its_tasks(tmp_path: Path) -> None:
    score = scored("mlvu", tmp_path, {"plotQA/0": "(A) Red", "plotQA/1": "A", "count/0": "C"})
    assert parts(score) == {"plotQA": (50.0, 2), "count": (100.0, 1)}
    assert score.total == 75.0
    assert scored("mlvu", tmp_path, {"count/0": "three"}).unreadable == 1


def test_video_mme_leaves_out_answers_without_a_letter(tmp_path: Path) -> None:
    score = scored("video-mme", tmp_path, {"001-1": "C. Green.", "001-2": "hm", "601-1": "D"})
    assert parts(score) == {"short": (100.0, 1), "long": (0.0, 1), "Counting Problem": (50.0, 2)}
    assert (score.total, score.unreadable) == (50.0, 1)


def test_long_video_bench_counts_every_question_once(tmp_path: Path) -> None:
    score = scored("longvideobench", tmp_path, {"x_0": "C", "x_1": "B"})
    assert parts(score) == {"15 s": (100.0, 1), "3600 s": (0.0, 1), "T2E": (100.0, 1), "S2O": (0.0, 1)}
    assert score.total == 50.0


def test_ovo_bench_is_the_mean_of_three_groups_of_tasks(tmp_path: Path) -> None:
    answers = {"0": "A. x", "1": "C", "2_0": "2 times", "3_0": "No", "3_1": "Y", "4_0": "No."}
    score = scored("ovo-bench", tmp_path, answers)
    assert parts(score) == {
        "EPM": (100.0, 1),
        "backward": (100.0, 1),
        "OCR": (0.0, 1),
        "real-time": (0.0, 1),
        "REC": (100.0, 1),
        "SSR": (100.0, 2),
        "CRR": (0.0, 1),
        "forward": (66.67, 4),
    }
    assert score.total == pytest.approx((100 + 0 + 200 / 3) / 3)
    alone = scored("ovo-bench", tmp_path, {"0": "A"})
    assert (alone.total, alone.note) == (None, "a total needs questions of all three groups")


def test_streaming_bench_reads_the_first_character(tmp_path: Path) -> None:
    answers = {"real/0/0": "C. b", "real/1/0": "The answer is A", "sqa/0/0": "B"}
    score = scored("streamingbench", tmp_path, answers)
    assert parts(score)["Counting"] == (100.0, 1)
    assert parts(score)["Object Recognition"] == (0.0, 1)
    assert score.total == pytest.approx(200 / 3)
    assert score.unreadable == 1


@pytest.mark.parametrize(
    ("yes", "output", "timely", "right"),
    [((2, 3), "3", 100.0, 100.0), ((5,), "4", 100.0, 0.0), ((6, 7), "3", 0.0, 0.0), ((), "", 0.0, 0.0)],
)
def test_an_output_must_come_in_time_and_be_right(
    tmp_path: Path, yes: tuple[int, ...], output: str, timely: float, right: float
) -> None:
    answers = {f"proactive/0/0/{second}": "Yes" if second in yes else "No" for second in range(2, 8)}
    answers |= {f"proactive/0/0/{second}/output": output for second in yes}
    found = parts(scored("streamingbench", tmp_path, answers))
    assert found == {"Proactive Output": (right, 1), "Proactive Output, time alone": (timely, 1)}


def test_rvs_is_what_the_judge_says_or_nothing(tmp_path: Path) -> None:
    answers = {"v1/0": "a mug", "v1/1": "there"}
    said = {"v1/0": Verdict(True, 4), "v1/1": Verdict(False, 1)}
    score = scored("rvs-ego", tmp_path, answers, said)
    assert (score.total, parts(score)["score"], parts(score)["Object, accuracy"]) == (50.0, (2.5, 2), (100.0, 1))
    alone = scored("rvs-ego", tmp_path, answers, {"v1/0": Verdict(True, 4)})
    assert (alone.total, alone.parts, alone.note) == (None, {}, "1 of 2 answers are not judged: give --judge")
