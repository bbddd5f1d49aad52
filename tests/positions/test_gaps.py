"""Closing gaps in integers alone: streams of every family placed by its own rule, kept at random in every head, closed again and again."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from millpond.models import Family, Tokens
from millpond.policies.base import SEPARATOR, TEXT
from millpond.positions import Clock
from millpond.positions.gaps import Closing, measure
from tests.models.tiny import FAMILIES, tiny

SECOND = 1_000_000


@dataclass
class Head:
    """What one head holds. `piece` numbers what moves as a whole on the row and column axes: a text token, or a grid's segment; `group`
    numbers text tokens and frame groups in the order of the stream."""

    positions: torch.Tensor
    grid_position: torch.Tensor
    piece: torch.Tensor
    group: torch.Tensor

    def take(self, index: torch.Tensor) -> None:
        for name in ("positions", "grid_position", "piece", "group"):
            setattr(self, name, getattr(self, name)[index])

    def add(self, *parts: torch.Tensor) -> None:
        for name, part in zip(("positions", "grid_position", "piece", "group"), parts, strict=True):
            setattr(self, name, torch.cat([getattr(self, name), part]))


@dataclass
class Stream:
    """A stream in integers: `heads` heads, each of which keeps `slots` tokens behind the prompt."""

    family: Family
    random: torch.Generator
    slots: int = 60
    clock: Clock = field(default_factory=Clock)
    heads: list[Head] = field(default_factory=list)
    pieces: int = 0
    groups: int = 0
    time: int = 0
    newest: int = 0  # tokens of the newest group
    closed: int = 0
    prompt: int = 5

    def __post_init__(self) -> None:
        axes = self.family.geometry.axes
        for _ in range(3):
            nothing = torch.empty(0, dtype=torch.long)
            self.heads.append(
                Head(torch.empty(0, axes, dtype=torch.int32), torch.empty(0, 2, dtype=torch.int16), nothing, nothing)
            )
        self.text(self.prompt)

    def draw(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self.random))

    def text(self, count: int) -> None:
        self._append(_tokens(torch.full((count, 2), TEXT), torch.zeros(count, dtype=torch.bool), self.time))

    def frames(self, groups: int, rows: int, cols: int, *, let_in: bool = True) -> None:
        """A block of groups at uneven times; with a text and tags around each where the family has them."""
        grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), dim=-1).view(-1, 2)
        parts = []
        for _ in range(groups):
            self.time += self.draw(1, 5) * SECOND
            parts.append(_tokens(grid, torch.ones(len(grid), dtype=torch.bool), self.time))
            if self.family.model_types == ("qwen3_vl",):
                for at, count in ((0, self.draw(8, 11)), (2, 1)):
                    tag = _tokens(torch.full((count, 2), TEXT), torch.zeros(count, dtype=torch.bool), self.time)
                    parts.insert(len(parts) - 1 + at // 2, tag)
        fields = ("embeds", "grid_position", "time_us", "visual")
        self._append(Tokens(*(torch.cat([getattr(part, name) for part in parts]) for name in fields)), let_in=let_in)

    def _append(self, tokens: Tokens, *, let_in: bool = True) -> None:
        if self.clock.next > 100:
            self.close()
        base = self.clock.base
        positions = self.family.assign_positions(tokens, self.clock).T.to(torch.int32)
        frames = bool(tokens.visual.any())
        grid_position = torch.where(tokens.visual[:, None], tokens.grid_position, SEPARATOR if frames else TEXT).to(
            torch.int16
        )
        # A text token is a piece of its own; a grid is one with all others of its segment.
        begins = ~tokens.visual | ~tokens.visual.roll(1)
        begins[0] = self.clock.base is None or self.clock.base != base
        piece = self.pieces + begins.cumsum(0)
        new_time = torch.cat([torch.ones(1, dtype=torch.bool), tokens.time_us.diff() != 0])
        group = self.groups + (new_time | begins).cumsum(0)
        self.pieces, self.groups = int(piece[-1]), int(group[-1])
        if not let_in:
            return
        self.newest = int((group == group[-1]).sum())  # gaps between older groups are every head's own
        for head in self.heads:
            head.add(positions, grid_position, piece, group)
            free = len(head.group) - self.prompt - len(tokens)
            if free > self.slots:
                kept = torch.randperm(free, generator=self.random)[: self.slots].sort().values + self.prompt
                head.take(
                    torch.cat([torch.arange(self.prompt), kept, torch.arange(self.prompt + free, len(head.group))])
                )

    def close(self) -> None:
        closing = measure([(head.positions, head.grid_position) for head in self.heads], self.clock)
        for head in self.heads:
            shift = closing.shifts(head.positions, head.grid_position)
            assert shift.dtype == torch.int64
            head.positions -= shift.to(torch.int32)
        self.clock.shift(closing.before, closing.before + closing.after + closing.tail)
        self.closed += 1
        again = measure([(head.positions, head.grid_position) for head in self.heads], self.clock)
        assert (again.before, again.after, again.tail) == (0, 0, 0)

    def check(self) -> None:
        """What must hold at any time, in every head."""
        ends = set()
        for head in self.heads:
            at, grid_position = head.positions.long(), head.grid_position.long()
            assert int(at.min()) == 0
            assert int(at.max()) < self.clock.next
            assert at[: self.prompt].tolist() == [[n] * at.shape[1] for n in range(self.prompt)]
            ends.add(tuple(map(tuple, at[-self.newest :].tolist())))
            visual = grid_position[:, 0] > TEXT
            assert bool((at[~visual] == at[~visual][:, :1]).all()), "text stands at one position on all axes"
            for group in head.group[visual].unique():
                mine = head.group == group
                assert len(at[mine, 0].unique()) == 1 or at.shape[1] == 1, "a group has one time"
            if at.shape[1] > 1:
                base = at[:, 1:] - grid_position
                for piece in head.piece[visual].unique():
                    mine = base[visual & (head.piece == piece)]
                    assert bool((mine == mine[0, 0]).all()), "a grid keeps its offsets from one base"
                    assert bool((at[visual & (head.piece == piece), 0] >= mine[0, 0]).all())
            later = head.group.diff() > 0
            assert bool((at[:, 0].diff()[later] > 0).all()), "order follows time"
            for axis in range(at.shape[1]):
                reach = at.amax(1).cummax(0).values
                assert bool((at[1:, axis] > reach[:-1])[head.piece.diff() > 0].all()), (
                    "a piece stands behind all before it"
                )
        assert len(ends) == 1, "the newest group stands at one place in every head"


def _tokens(grid_position: torch.Tensor, visual: torch.Tensor, time_us: int) -> Tokens:
    count = len(grid_position)
    return Tokens(torch.empty(count, 0), grid_position.to(torch.int16), torch.full((count,), time_us), visual)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_groups_grids_and_order_outlast_any_number_of_closings(name: str) -> None:
    stream = Stream(tiny(name), torch.Generator().manual_seed(0))
    rows, cols = 4, 7
    for _ in range(150):
        what = stream.draw(0, 19)
        if what == 0:
            stream.text(stream.draw(3, 20))
        elif what == 1:
            rows, cols = stream.draw(1, 6), stream.draw(1, 9)
        else:
            stream.frames(stream.draw(1, 3), rows, cols, let_in=what > 4)
        stream.check()
    assert stream.closed >= 3


def closed(
    head: list[tuple[int, int, int]], places: list[tuple[int, int]], clock: Clock
) -> tuple[Closing, list[list[int]]]:
    """How far one head alone closes, and by how much each of its tokens moves."""
    positions, grid_position = torch.tensor(head, dtype=torch.int32), torch.tensor(places, dtype=torch.int16)
    closing = measure([(positions, grid_position)], clock)
    return closing, closing.shifts(positions, grid_position).tolist()


def test_gaps_by_hand_in_front_of_a_grid_and_within_it() -> None:
    """Text at 0 and 1; a grid at base 10 that starts at time 14 and goes on at 40; text at 60, and the clock at 75; step 2."""
    text, grid = (TEXT, TEXT), [(0, 0), (0, 3), (1, 0)]
    head = [(0, 0, 0), (1, 1, 1), *[(time, 10 + row, 10 + col) for time in (14, 40) for row, col in grid], (60, 60, 60)]
    closing, shifts = closed(head, [text, text, *grid, *grid, text], Clock(next=75, base=None, step=2))
    # In front of the grid 10 comes to 1 + 2; its columns reach 13, times 14 and 40 come to 13 + 2 (taken as it is: 14 - 13 < 2) and 14 + 2.
    in_front, within, behind = 10 - 3, 40 - 16, 60 - 42
    assert (closing.before, closing.after, closing.tail) == (in_front + within + behind, 0, 75 - 60 - 2)
    first, second = in_front, in_front + within
    assert shifts == [[0, 0, 0]] * 2 + [[first, 7, 7]] * 3 + [[second, 7, 7]] * 3 + [[second + behind] * 3]
    # While the grid's segment is open, what lies within it closes behind its base.
    closing, shifts = closed(head[:-1], [text, text, *grid, *grid], Clock(next=75, base=10, step=2))
    assert (closing.base, closing.before, closing.after, closing.tail) == (10, in_front, within, 75 - 40 - 2)
    assert shifts == [[0, 0, 0]] * 2 + [[first, 7, 7]] * 3 + [[second, 7, 7]] * 3
    # A base of which nothing is stored counts as taken.
    closing, shifts = closed(head[:2], [text, text], Clock(next=75, base=30, step=2))
    assert (closing.before, closing.after, closing.tail) == (30 - 3, 0, 75 - 30 - 2)
    assert shifts == [[0, 0, 0]] * 2


def test_one_axis_has_no_grids() -> None:
    positions, places = torch.tensor([[0], [9], [11]], dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int16)
    closing = measure([(positions, places)], Clock(next=20, step=3))
    assert (closing.before, closing.after, closing.tail) == (9 - 3, 0, 20 - 11 - 3)
    assert closing.shifts(positions, places).tolist() == [[0], [6], [6]]


def test_all_heads_close_what_the_tightest_can_and_a_gap_can_stay_open() -> None:
    def head(*times: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(times, dtype=torch.int32)[:, None].expand(-1, 3), torch.full(
            (len(times), 2), TEXT, dtype=torch.int16
        )

    heads = [head(0, 10, 30), head(0, 20, 25), head(0, 1, 30)]
    closing = measure(heads, Clock(next=40, step=1))
    assert (closing.before, closing.after, closing.tail) == (23, 0, 9)
    assert [closing.shifts(*one)[:, 0].tolist() for one in heads] == [[0, 9, 23], [0, 19, 23], [0, 0, 23]]
    assert replace(closing, before=5, after=8).leaving(3) == replace(closing, before=5, after=5)
    assert replace(closing, before=5, after=8).leaving(10) == replace(closing, before=3, after=0)
    assert replace(closing, before=5, after=8).leaving(99) == replace(closing, before=0, after=0)
