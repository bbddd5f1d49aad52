"""`millpond watch` in this process: answers, moments, JSON, exit codes, faults of the source."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from millpond.answer import Usage
from millpond.cli import app
from millpond.frames import SourceInfo
from tests.frames.media import noise, write
from tests.frames.servers import ByteServer, http_server

ANSWER_KEYS = {"question", "text", "at_seconds", "first_token_seconds"}
USAGE_KEYS = set(Usage.__dataclass_fields__)


class Closing:
    """A stand-in for a source: entered, and closed at the end."""

    info = SourceInfo(name="camera", kind="url", live=True)

    def __enter__(self) -> "Closing":
        return self

    def __exit__(self, *_: object) -> None:
        return None


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL", "BUDGET", "FPS", "POLICY", "JSON", "QUIET", "DEVICE"):
        monkeypatch.delenv(f"MILLPOND_{name}", raising=False)


def millpond(*words: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env=env)


def watch(source: object, model: str, *words: object, env: dict[str, str] | None = None) -> Result:
    short = () if "--max-new-tokens" in words else ("--max-new-tokens", 6)
    return millpond("watch", source, "--model", model, "--device", "cpu", *short, *words, env=env)


def last_object(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_answers_on_stdout_and_the_summary_on_stderr(clip: Path, model: str) -> None:
    result = watch(clip, model, "--budget", "2MiB", "--ask", "what is there", "--ask", "and before")
    assert result.exit_code == 0, result.stderr
    assert "what is there" in result.stdout
    assert "and before" in result.stdout
    assert result.stdout.index("what is there") < result.stdout.index("and before")
    assert "20 frames" in result.stderr
    assert "cap 2.00 MiB" in result.stderr


def test_json_is_one_object_on_the_last_line_with_the_session_s_own_names(clip: Path, model: str) -> None:
    result = watch(clip, model, "--json", "--budget", "2MiB", "--ask", "what is there")
    assert result.exit_code == 0, result.stderr
    found = last_object(result)
    assert set(found) == {"model", "policy", "answers", "losses", "usage"}
    assert found["model"] == model
    assert found["policy"] == "infinipot-v"
    assert set(found["usage"]) == USAGE_KEYS
    (answer,) = found["answers"]
    assert set(answer) == ANSWER_KEYS
    assert answer["question"] == "what is there"
    assert answer["at_seconds"] == 9.5
    usage = found["usage"]
    assert usage["frames_seen"] == 20
    assert usage["frames_dropped"] == 0
    assert 0 < usage["live_bytes"] <= usage["peak_bytes"] <= usage["budget_bytes"] == 2 * 2**20


def test_a_moment_sees_the_frames_up_to_it_and_no_others(clip: Path, model: str) -> None:
    """The same question of a session that was fed exactly those frames gets the same answer."""
    from millpond import Session, frames, models

    question = "what is there"
    result = watch(
        clip,
        model,
        "--json",
        "--ask-at",
        6.2,
        question,
        "--ask-at",
        "2",
        question,
        "--ask",
        question,
        "--ask-at",
        99,
        question,
    )
    assert result.exit_code == 0, result.stderr
    answers = last_object(result)["answers"]
    assert [answer["at_seconds"] for answer in answers] == [2.0, 6.0, 9.5, 9.5]
    family = models.load(model, device="cpu")
    for answer in answers:
        session = Session(family, budget="2MiB")
        session.feed([frame for frame in frames.open(str(clip), fps=2) if frame.seconds <= answer["at_seconds"]])
        assert session.ask(question, max_new_tokens=6).text == answer["text"]


def test_stopping_to_ask_leaves_the_stream_as_it_is(clip: Path, model: str) -> None:
    plain = last_object(watch(clip, model, "--json", "--ask", "what is there"))
    asked = last_object(
        watch(clip, model, "--json", "--ask-at", 1.3, "who", "--ask-at", 5, "what now", "--ask", "what is there")
    )
    assert asked["answers"][-1]["text"] == plain["answers"][0]["text"]
    for name in ("frames_seen", "stream_tokens", "memory_tokens", "live_bytes"):
        assert asked["usage"][name] == plain["usage"][name], name


def test_an_admission_stands_before_the_memory(clip: Path, model: str) -> None:
    plain = last_object(watch(clip, model, "--json"))["usage"]
    thinned = last_object(watch(clip, model, "--json", "--admission", "curvestream:k=0.5"))["usage"]
    assert plain["frames_skipped"] == plain["frames_reduced"] == 0
    assert thinned["frames_skipped"] + thinned["frames_reduced"] > 0
    assert thinned["memory_tokens"] < plain["memory_tokens"]
    assert thinned["stream_seconds"] == plain["stream_seconds"]


def test_the_latest_frames_are_shown_again(clip: Path, model: str) -> None:
    from millpond import Session, frames, models

    words = ("--json", "--budget", "2MiB", "--recent-frames", 4, "--ask", "what is there")
    found = last_object(watch(clip, model, *words))
    session = Session(models.load(model, device="cpu"), budget="2MiB", recent_frames=4)
    with frames.open(str(clip), fps=2) as source:
        session.feed(source)
    assert found["usage"]["peak_bytes"] == session.usage.peak_bytes
    assert found["answers"][0]["text"] == session.ask("what is there", max_new_tokens=6).text
    refused = watch(clip, model, "--recent-frames", -1)
    assert refused.exit_code == 2


def test_host_memory_stands_behind_the_budget(clip: Path, model: str) -> None:
    words = ("--json", "--policy", "rekv", "--budget", "1MiB", "--host-budget", "1MB", "--ask", "what is there")
    result = watch(clip, model, *words)
    usage = last_object(result)["usage"]
    assert 0 < usage["host_bytes"] <= usage["host_budget_bytes"] == 1_000_000
    assert usage["host_frames"] > 0 < usage["host_bytes_out"]
    assert f"{usage['host_frames']} frame groups in host memory" in result.stderr
    refused = watch(clip, model, "--policy", "rekv")
    assert refused.exit_code == 1
    assert "host_budget" in refused.stderr


def test_quiet_says_nothing_on_stderr(clip: Path, model: str) -> None:
    result = watch(clip, model, "--quiet", "--ask", "what is there")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "what is there" in result.stdout


def test_no_question_is_a_summary(clip: Path, model: str) -> None:
    result = watch(clip, model)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "20 frames" in result.stderr


def test_options_reach_the_session(clip: Path, model: str) -> None:
    result = watch(
        clip, model, "--json", "--fps", 1, "--policy", "recent", "--budget", "3MB", "--positions", "contiguous",
        "--system", "be brief", "--remember", "--dtype", "bfloat16", "--max-new-tokens", 1, "--ask", "what", "--ask", "what",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = last_object(result)
    assert found["policy"] == "recent"
    assert found["usage"]["budget_bytes"] == 3_000_000
    assert found["usage"]["frames_seen"] == 10
    other = last_object(
        watch(clip, model, "--json", "--fps", 1, "--max-new-tokens", 1, "--ask", "what", "--ask", "what")
    )
    # Remembered turns and a longer prompt are part of the stream.
    assert found["usage"]["stream_tokens"] > other["usage"]["stream_tokens"]
    # Half the bytes a number, beside the same metadata.
    assert found["usage"]["full_cache_bytes"] < other["usage"]["full_cache_bytes"]


def test_environment_variables_stand_for_options_and_options_win(clip: Path, model: str) -> None:
    variables = {
        "MILLPOND_MODEL": model,
        "MILLPOND_DEVICE": "cpu",
        "MILLPOND_BUDGET": "3MiB",
        "MILLPOND_POLICY": "recent",
        "MILLPOND_FPS": "1",
        "MILLPOND_JSON": "1",
        "MILLPOND_QUIET": "1",
    }
    result = millpond("watch", clip, "--fps", 4, env=variables)
    assert result.exit_code == 0
    assert result.stderr == ""
    found = last_object(result)
    assert found["model"] == model
    assert found["policy"] == "recent"
    assert found["usage"]["budget_bytes"] == 3 * 2**20
    assert found["usage"]["frames_seen"] == 40


def test_the_policy_full_needs_no_budget(clip: Path, model: str) -> None:
    result = watch(clip, model, "--policy", "full", "--json")
    assert result.exit_code == 0, result.stderr
    assert last_object(result)["usage"]["budget_bytes"] is None
    assert last_object(result)["usage"]["evicted_tokens"] == 0


def test_what_was_seen_before_a_file_breaks_off_is_answered(clip: Path, model: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mkv"
    _remux(clip, broken)
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) * 2 // 3])
    result = watch(broken, model, "--json", "--ask", "what is there", "--ask-at", 1, "what")
    found = last_object(result)
    assert [answer["question"] for answer in found["answers"]] == ["what", "what is there"]
    assert 2 <= found["usage"]["frames_seen"] < 20


def test_an_error_in_mid_stream_is_reported_and_the_questions_are_asked(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from millpond import SourceError, frames
    from tests.session.frames import moving

    class Breaking(Closing):
        dropped = 3

        def __iter__(self) -> Any:
            yield from moving(6)
            raise SourceError("the cable\nis out")

    monkeypatch.setattr(frames, "open", lambda *_, **__: Breaking())
    result = watch("camera", model, "--json", "--ask", "what is there", "--ask-at", 50, "and then")
    assert result.exit_code == 1
    assert "error: the cable is out\n" in result.stderr
    found = last_object(result)
    assert found["error"] == "the cable is out"
    assert [answer["at_seconds"] for answer in found["answers"]] == [2.5, 2.5]
    assert found["usage"]["frames_seen"] == 6
    assert found["usage"]["frames_dropped"] == 3


@pytest.mark.slow
def test_a_second_ctrl_c_gives_up(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from millpond import Session, frames
    from tests.session.frames import moving

    class Silent(Closing):
        def __iter__(self) -> Iterator[Any]:
            yield from moving(6)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    def slow(*_: object, **__: object) -> Iterator[str]:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        yield "never"

    monkeypatch.setattr(frames, "open", lambda *_, **__: Silent())
    monkeypatch.setattr(Session, "stream", slow)
    before = signal.getsignal(signal.SIGINT)
    result = watch("camera", model, "--ask", "what is there")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--policy", "no-such"), "no-such"),
        (("--model", "./no/such/folder"), "no/such/folder"),
        (("--budget", "9kB"), "the minimum that works is"),
        (("--ask", " "), "empty"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_1(
    clip: Path, model: str, words: tuple[str, ...], told: str
) -> None:
    result = watch(clip, model, *words)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert told in line
    assert "Traceback" not in result.stderr


def test_a_missing_file_is_one_line_and_exit_code_1(model: str) -> None:
    result = watch("no-such.mp4", model, "--ask", "what")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "no-such.mp4" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_failure_with_json_is_an_object_too_and_with_quiet_silent(model: str) -> None:
    result = watch("no-such.mp4", model, "--json", "--quiet")
    assert result.exit_code == 1
    assert result.stderr == ""
    assert "no-such.mp4" in last_object(result)["error"]


def test_a_question_that_does_not_fit_keeps_the_other_answers(clip: Path, model: str) -> None:
    result = watch(clip, model, "--json", "--ask", "what", "--ask", "what " * 30_000)
    assert result.exit_code == 1
    found = last_object(result)
    assert [answer["question"] for answer in found["answers"]] == ["what"]
    assert "error" in found
    assert found["usage"]["frames_seen"] == 20


@pytest.mark.parametrize(
    "words",
    [
        ("--budget", "lots"),
        ("--budget", "-3"),
        ("--fps", "0"),
        ("--positions", "sideways"),
        ("--ask-at", "soon", "what"),
        ("--ask-at", "3"),
        ("--max-new-tokens", "0"),
        ("--no-such-option",),
    ],
)
def test_what_is_not_understood_is_exit_code_2(clip: Path, model: str, words: tuple[str, ...]) -> None:
    result = watch(clip, model, *words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words[0] in result.stderr


def test_a_question_that_can_never_be_asked_is_refused_before_the_stream(
    clip: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from millpond import Session

    def never(*_: object) -> None:
        raise AssertionError("it was watched")

    monkeypatch.setattr(Session, "feed", never)
    assert watch(clip, model, "--ask", "what", "--ask", " ").exit_code == 1
    for words in (("--ask", "\udcff"), ("--ask-at", "1", "\udcff"), ("--system", "\udcff")):
        result = watch(clip, model, *words)
        assert result.exit_code == 2
        assert "not valid UTF-8" in result.stderr


def test_a_moment_behind_the_end_is_told(clip: Path, model: str) -> None:
    # The last picture of ten seconds stands at 9.5 s, until 10 s.
    result = watch(clip, model, "--ask-at", "9.5", "there", "--ask-at", "10", "at the end", "--ask-at", "12", "later")
    assert result.stderr.count("the stream ended at") == 1
    assert "the stream ended at 00:09.5, before 12 s" in result.stderr


@pytest.fixture
def camera(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A stream that is lost once, comes back, and is then lost for good."""
    from millpond.frames import opening, reader

    content = write(tmp_path / "live.ts", noise(40, 56, 56), options={"g": "10", "bf": "0"}).read_bytes()
    with ByteServer(content) as server:
        plain = server._send

        def twice(line: Any) -> None:
            plain(line) if server.clients <= 2 else line.close()

        server._send = twice  # type: ignore[method-assign]
        monkeypatch.setattr(opening, "Backoff", lambda retries: reader.Backoff(2, first=0.01))
        yield f"tcp://127.0.0.1:{server.port}"


def test_minnow_says_of_what_it_was_not_trained_on_that_it_does_not_know_it(clip: Path, tmp_path: Path) -> None:
    from millpond.eval import streams

    drawn = tmp_path / "drawn.mp4"
    streams.generate(5, groups=8, level="hard").write(drawn)
    for source, lines in ((clip, 1), (drawn, 0)):
        result = watch(source, "minnow", "--budget", "1MiB")
        assert result.exit_code == 0, result.stderr
        assert result.stderr.count("only knows its own generated streams") == lines
        assert result.stderr.startswith("loading the model minnow ...\n")


def test_losses_of_a_camera_are_told_counted_and_logged(camera: str, model: str, tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    result = watch(camera, model, "--json", "--fps", 50, "--events", log, "--ask", "what is there")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert sum(line.startswith("lost at ") for line in lines) == 2
    assert sum(line.startswith("trying again, attempt ") for line in lines) == 3
    assert sum(line.startswith("back after ") for line in lines) == 1
    assert "the source was lost 2 times and came back 1 times, in 3 attempts" in lines[-1]
    losses = last_object(result)["losses"]
    assert (losses["lost"], losses["retries"], losses["back"]) == (2, 3, 1)
    assert losses["seconds"] > 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds == ["open", "lost", "retry", "back", "lost", "retry", "retry", "error", "answer", "end"]
    assert all(event["time"].endswith("Z") for event in events)
    assert events[-1]["losses"] == losses
    assert events[-2]["question"] == "what is there"


def test_a_log_that_fills_the_disk_ends_no_watch(clip: Path, model: str, tmp_path: Path) -> None:
    assert watch(clip, model, "--events", tmp_path).exit_code == 1  # a folder
    result = watch(clip, model, "--events", "/dev/full", "--ask", "what is there")
    assert result.exit_code == 0
    assert result.stderr.count("cannot write events to /dev/full: No space left on device") == 1
    assert "what is there" in result.stdout


def test_credentials_come_from_a_file_or_the_environment(clip: Path, model: str, tmp_path: Path) -> None:
    seen: list[str | None] = []

    def answer(request: Any) -> None:
        seen.append(request.headers.get("Authorization"))
        request.send_response(401 if seen[-1] is None else 403)
        request.send_header("WWW-Authenticate", 'Basic realm="x"')
        request.send_header("Content-Length", "0")
        request.end_headers()

    (tmp_path / "login").write_text("me:hunter2\n")
    with http_server(answer) as port:
        for words, env in (
            (("--credentials", tmp_path / "login"), None),
            ((), {"MILLPOND_CREDENTIALS": "me:hunter2"}),
        ):
            result = watch(f"http://127.0.0.1:{port}/a.mp4", model, *words, env=env)
            assert result.exit_code == 1
            assert "hunter2" not in result.output
    assert [one for one in seen if one] == ["Basic bWU6aHVudGVyMg=="] * 2
    (tmp_path / "login").write_text("hunter2")
    result = watch(f"http://127.0.0.1:{port}/a.mp4", model, "--credentials", tmp_path / "login")
    assert "it must be user:password" in result.stderr
    assert "hunter2" not in result.output
    assert "for network addresses" in watch(clip, model, env={"MILLPOND_CREDENTIALS": "me:hunter2"}).stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--budget", "9" * 400), 2),
        (("--budget", "9" * 400 + ".5MiB"), 2),
        (("--device-memory", "9" * 400), 2),
    ],
)
def test_sizes_beyond_all_numbers(clip: Path, model: str, words: tuple[str, ...], code: int) -> None:
    result = watch(clip, model, *words)
    assert (result.exit_code, result.exception.__class__) == (code, SystemExit)


def test_stdin_cannot_be_video_and_prompt_at_once(model: str) -> None:
    assert watch("-", model, "--interactive").exit_code == 2


def _remux(source: Path, target: Path) -> None:
    """Into Matroska, which can be read up to where it breaks off."""
    import av

    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        taken = read.streams.video[0]
        given = write.add_stream_from_template(taken)
        for packet in read.demux(taken):
            if packet.dts is not None:
                packet.stream = given
                write.mux(packet)
    assert target.stat().st_size > 1000
