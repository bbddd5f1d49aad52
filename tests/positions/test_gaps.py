"""Closing gaps in integers alone: streams of every family placed by its own rule, kept at random in every head, closed again and again."""

from dataclasses import dataclass, field

import pytest
import torch

from millpond.models import Family, Tokens
from millpond.policies.base import SEPARATOR, TEXT
from millpond.positions import Clock
from millpond.positions.gaps import measure
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
