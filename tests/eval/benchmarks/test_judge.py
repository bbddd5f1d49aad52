"""A judge at an address: asked once for each answer, in the words of the literature; what it says is read or not counted."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from millpond.cli.main import app
from millpond.errors import MillpondError
from millpond.eval.benchmarks.base import Query, Verdict
from millpond.eval.benchmarks.judge import KEY, SYSTEM, Judge, read_verdict
from tests.eval.benchmarks import published
from tests.eval.benchmarks.test_command import ARMS, evaluate


class Server(HTTPServer):
    """Answers like an OpenAI-compatible server, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.names = ["the-judge"]
        self.says = ["{'pred': 'yes', 'score': 4.8}"]
        self.status = 200
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._answer({"data": [{"id": name} for name in self.server.names]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.append(self.headers["Authorization"])
        said = self.server.says[(len(self.server.asked) - 1) % len(self.server.says)]
        self._answer({"choices": [{"message": {"content": said}}]} if self.path == "/v1/chat/completions" else {})

    def _answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


QUERY = Query("v/0", "What is it?", "all", 1.0, {"question": "What is it?", "answer": "a cup"})


def test_a_judge_is_asked_in_the_words_of_the_literature(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    assert Judge(server.url).verdict(QUERY, "a mug") == Verdict(True, 4)
    (asked,) = server.asked
    assert (asked["model"], asked["temperature"]) == ("the-judge", 0)
    assert asked["messages"][0] == {"role": "system", "content": SYSTEM}
    assert "Question: What is it?\nCorrect Answer: a cup\nPredicted Answer: a mug\n" in asked["messages"][1]["content"]
    assert server.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("{'pred': 'yes', 'score': 4.8}", Verdict(True, 4)),
        ("Sure: {'pred': 'No', 'score': '2'}.", Verdict(False, 2)),
        ('{"pred": "yes", "score": 5}', Verdict(True, 5)),
        ("yes, 5", None),
        ("{'pred': 'perhaps', 'score': 3}", None),
        ("{'pred': 'yes', 'score': 9}", None),
        ("{'pred': 'yes'}", None),
        ("{'pred': open('x'), 'score': 1}", None),
        ("{" * 5000 + "}", None),
    ],
)
def test_a_verdict_is_a_word_and_points_from_0_to_5(said: str, verdict: Verdict | None) -> None:
    assert read_verdict(said) == verdict


def test_a_judge_that_rambles_is_asked_three_times(server: Server) -> None:
    server.says = ["well", "well", "{'pred': 'no', 'score': 0}", "well"]
    judge = Judge(server.url, "another")
    assert judge.verdict(QUERY, "a mug") == Verdict(False, 0)
    server.says = ["well"]
    assert judge.verdict(QUERY, "a mug") is None
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("judge:8000", "begins with http"),
        ("file:///etc/passwd", "begins with http"),
        ("http://me:secret@127.0.0.1/v1", f"into {KEY}"),
        ("http://127.0.0.1:1/v1", "cannot be asked"),
    ],
)
def test_an_address_that_cannot_be_asked_is_one_line(url: str, line: str) -> None:
    with pytest.raises(MillpondError, match=line) as error:
        Judge(url)
    assert "secret" not in str(error.value)


def test_a_server_that_refuses_or_is_none_of_its_kind_is_one_line(server: Server) -> None:
    server.names = ["one", "two"]
    with pytest.raises(MillpondError, match="--judge-model: it has one, two"):
        Judge(server.url)
    judge = Judge(server.url.replace("/v1", "/v2"), "one")
    with pytest.raises(MillpondError, match="OpenAI's form"):
        judge.verdict(QUERY, "a mug")
    server.status = 401
    with pytest.raises(MillpondError, match="refuses: 401"):
        Judge(server.url, "one").verdict(QUERY, "a mug")


def test_answers_are_kept_without_a_judge_and_each_is_judged_once(tmp_path: Path, server: Server) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    published.rvs_ego(data)
    without = evaluate("rvs-ego", data, out)
    assert {row["note"] for row in without["rows"]} == {"2 of 2 answers are not judged: give --judge"}
    server.says = ["{'pred': 'yes', 'score': 4}", "{'pred': 'no', 'score': 1}"]
    judged = evaluate("rvs-ego", data, out, "--judge", server.url)
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    different = {(reply["query"], reply["text"]) for one in answers for reply in one["replies"]}
    assert len(server.asked) == len(different)
    assert judged["judge"] == {"model": "the-judge", "system": SYSTEM, "user": judged["judge"]["user"]}
    assert [row["policy"] for row in judged["rows"]] == ARMS
    assert all(row["parts"]["score"]["questions"] == 2 for row in judged["rows"])
    # Scored again from the folder alone, without asking anybody.
    again = evaluate("rvs-ego", data, out, "--merge")
    assert again == judged
    evaluate("rvs-ego", data, out, "--judge", server.url)
    assert len(server.asked) == len(different)


def test_the_words_of_the_judge_are_shown(tmp_path: Path, server: Server) -> None:
    published.rvs_movie(tmp_path / "data")
    words = ["eval", "rvs-movie", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--budget", "1MiB"]
    result = CliRunner().invoke(app, [*words, "--judge", server.url])
    assert result.exit_code == 0, result.output
    assert "the-judge is told:\nYou are an intelligent chatbot" in result.stderr
    assert "Please evaluate the following video-based question-answer pair" in result.stderr
