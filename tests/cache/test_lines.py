"""A consumer of the budget is a line: what the ledger lets anybody hold is what a line grants."""

import re
from pathlib import Path

import pytest
import torch

from millpond import BudgetError, Session
from millpond.cache import Ledger
from millpond.cache.consumers import make_plan
from millpond.cache.plan import Plan, Split
from millpond.memory.geometry import Geometry
from millpond.memory.lines import STORAGE, Line, slot_line
from tests.cache.text_model import Newest
from tests.models.tiny import tiny
from tests.session.frames import moving

SMALL = Geometry(layers=4, kv_heads=2, head_dim=32, dtype=torch.float32, axes=3)
LINES = (slot_line(SMALL, "slots", 1, "tokens"), Line("scratch", 0, 40, "work"), Line("more", 0, 9, "work", "scratch"))


def plan_with(*lines: Line) -> Plan:
    """A plan with further consumers of bytes alone."""
    beside = [lambda geometry, split, line=line: line for line in lines]
    return make_plan(2 << 20, SMALL, Newest(), prompt_tokens=9, group_tokens=16, beside=beside)


def test_a_further_consumer_takes_its_bytes_from_the_memory() -> None:
    plain, more = plan_with(), plan_with(Line("questions", 0, 300_000, "standing questions"))
    assert more.total_bytes <= 2 << 20
    assert sum(line.bytes for line in more.lines) == more.total_bytes
    taken = (plain.slots - more.slots) * more.bytes_per_token + plain.scratch_bytes - more.scratch_bytes
    assert 300_000 - 2 * more.bytes_per_token < taken < 300_000 + 2 * more.bytes_per_token
    ledger = Ledger(more.budget, more.lines)
    ledger.hold("questions", 300_000)
    assert more.to_dict()["lines"][-1] == {
        "name": "questions",
        "slots": 0,
        "bytes": 300_000,
        "purpose": "standing questions",
    }


def test_a_further_consumer_of_slots_is_part_of_the_reserve() -> None:
    def claim(geometry: Geometry, split: Split) -> Line:
        return slot_line(geometry, "questions", 50, "standing questions")

    plan = make_plan(2 << 20, SMALL, Newest(), prompt_tokens=9, group_tokens=16, reserve_tokens=40, reserve=[claim])
    assert plan.reserve_tokens == plan.turn_tokens + 50 == 90
    assert plan.prompt_tokens + plan.memory_tokens + plan.headroom_tokens + 90 == plan.slots


def test_a_line_that_cannot_be_is_refused() -> None:
    with pytest.raises(BudgetError, match="'scratch' is negative"):
        Plan(None, 1, (Line("scratch", 0, -1, ""),), 1, 1, 1, 16)
    with pytest.raises(BudgetError, match="two lines of the budget are called 'scratch'"):
        plan_with(Line("scratch", 0, 1, "another"))
    with pytest.raises(BudgetError, match="lines take 41 bytes of a budget of 40"):
        Plan(40, 1, (Line("scratch", 0, 41, ""),), 1, 1, 1, 16)
    with pytest.raises(BudgetError, match=r"lines take \d+ slots of \d+"):
        plan_with(slot_line(SMALL, "questions", 1, "slots that nobody has split off"))


def test_the_ledger_refuses_before_it_books() -> None:
    ledger = Ledger(100, (Line(STORAGE, 0, 100, ""), Line("scratch", 0, 100, "")))
    ledger.hold("storage", 60)
    with pytest.raises(BudgetError, match="over the budget"), ledger.borrow("scratch", 41):
        pytest.fail("entered")
    assert ledger.held == ledger.peak == 60
    with ledger.borrow("scratch", 40):
        assert ledger.held == 100
    ledger.hold("storage", 10)
    assert (ledger.held, ledger.peak, ledger.account("scratch")) == (10, 100, 0)


def test_an_account_that_no_line_names_is_refused() -> None:
    ledger = Ledger(None, LINES)
    for entry in (ledger.account, lambda name: ledger.hold(name, 1), lambda name: ledger.borrow(name, 1).__enter__()):
        with pytest.raises(
            BudgetError, match="no line of the plan has the account 'a stranger'; there are: storage, scratch"
        ):
            entry("a stranger")
    assert ledger.held == 0


def test_an_account_holds_what_its_lines_grant_and_no_more() -> None:
    ledger = Ledger(None, LINES)
    ledger.hold("scratch", 49)
    with pytest.raises(BudgetError, match="scratch would need 50 bytes, and the plan grants it 49"):
        ledger.hold("scratch", 50)
    assert ledger.account("scratch") == 49
    ledger.move(100)  # between two plans only the total is bounded
    ledger.hold("scratch", 100)
    with pytest.raises(BudgetError, match="over the budget of 100"):
        ledger.hold("scratch", 101)
    ledger.adopt(None, [*LINES, Line("undo", 0, 7, "")])
    with pytest.raises(BudgetError, match="grants it 49"):
        ledger.hold("scratch", 50)
    ledger.hold("undo", 7)


@pytest.mark.parametrize(
    ("policy", "arguments"),
    [
        ("mikv:base=snapkv:group=8", {"admission": "curvestream", "recent_frames": 2}),
        ("rekv", {"host_budget": "1MiB"}),
        ("h2o", {}),
        ("streammem", {}),
    ],
)
def test_the_lines_cover_what_a_stream_holds(
    policy: str, arguments: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    most: dict[str, int] = {}
    hold = Ledger.hold

    def watched(ledger: Ledger, name: str, size: int) -> None:
        hold(ledger, name, size)
        most[name] = max(most.get(name, 0), size)

    monkeypatch.setattr(Ledger, "hold", watched)
    family = tiny("qwen2_5_vl")
    budget = 400 * family.geometry.bytes_per_token + 120_000
    session = Session(family, budget=budget, policy=policy, **arguments)  # type: ignore[arg-type]
    session.feed(list(moving(150)))
    session.ask("what is there now", max_new_tokens=4, remember=True)
    assert session.usage.compactions > 0
    granted: dict[str, int] = {}
    for line in session.plan.lines:
        granted[line.account] = granted.get(line.account, 0) + line.bytes
    assert all(size <= granted[name] for name, size in most.items())
    assert {name for name, size in granted.items() if size} == {name for name, size in most.items() if size}
    assert most["storage"] == granted["storage"] == session._runner.pond.storage.nbytes


def test_the_page_on_memory_has_a_row_for_every_line() -> None:
    page = (Path(__file__).parents[2] / "docs" / "memory" / "index.md").read_text(encoding="utf-8")
    session = Session(tiny("qwen2_vl"), budget="5MiB", policy="rekv", host_budget="1MiB", recent_frames=2)
    lines = session.plan_for(56, 56).lines
    table = page.partition("| line | size | why |\n|---|---|---|\n")[2].partition("\n\n")[0]
    assert [row.split(" | ")[0].removeprefix("| ") for row in table.splitlines()] == [line.name for line in lines]
    slots = re.search(r"^    slots = (.+)$", page, re.MULTILINE)
    assert slots is not None
    assert slots[1].split(" + ") == [line.name for line in lines if line.slots]
