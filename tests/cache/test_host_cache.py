"""Host memory alone, against a list of frames: what is held, what it counts, and what comes back."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from millpond.cache.host import HostCache
from millpond.errors import BudgetError
from millpond.memory.geometry import Geometry
from tests.cache.test_rerotation import ROPE, WIDTH, roped

GEOMETRY = Geometry(layers=2, kv_heads=2, head_dim=WIDTH, dtype=torch.float32, axes=3)
TOKEN, FRAME = HostCache.token_bytes(GEOMETRY), HostCache.frame_bytes(GEOMETRY)
SIZE = 4
BUDGET = 5 * (SIZE * TOKEN + FRAME) + 3
"""Of five frames of four tokens, which is the size that the storage is cut by."""


class Frames:
    """Host memory, and a list of the frames that it should hold: [time, keys before rotation, values, positions, places]."""

    def __init__(self, budget: int = BUDGET, folder: Path | None = None) -> None:
        self.host = HostCache(GEOMETRY, ROPE, budget, folder)
        self.held: list[list[Any]] = []
        self.random = torch.Generator().manual_seed(0)
        self.at = 0

    def leave(self, *frames: tuple[int, int]) -> None:
        """Frames of so many tokens leave in one pass: (time, tokens)."""
        count = sum(tokens for _, tokens in frames)
        times = torch.cat([torch.full((tokens,), time) for time, tokens in frames])
        positions = torch.arange(self.at, self.at + count)[:, None].expand(-1, 3) + torch.tensor([0, 7, 9])
        places = torch.stack([torch.arange(count), torch.arange(count) + 1], 1).to(torch.int16)
        self.at += count
        raw, values = (torch.randn(GEOMETRY.layers, 2, count, WIDTH, generator=self.random) for _ in ("keys", "values"))
        arrivals = self.host.arrange(times, SIZE)
        self.host.register(arrivals, places, positions)
        leave = torch.arange(count) + 2  # behind two other slots of the layer
        for index in range(GEOMETRY.layers):
            keys = torch.zeros(1, 2, count + 2, WIDTH)
            for head in range(2):
                keys[0, head, 2:] = roped(raw[index, head], positions).float()
            padded = torch.cat([torch.zeros(1, 2, 2, WIDTH), values[index][None]], dim=2)
            self.host.offloading(arrivals, index, SimpleNamespace(keys=keys, values=padded), leave, 3)()  # type: ignore[arg-type]
        done = 0
        for time, tokens in frames:
            part = slice(done, done + tokens)
            new = [time, raw[:, :, part], values[:, :, part], positions[part], places[part]]
            if self.held and self.held[-1][0] == time:
                joined = [torch.cat([a, b], dim=-2) for a, b in zip(self.held[-1][1:], new[1:], strict=True)]
                self.held[-1] = [time, *joined]
            else:
                self.held.append(new)
            done += tokens

    def check(self, first: int, shift: int = 0) -> None:
        """The newest frames from number `first` on are held, in full."""
        host = self.host
        held = self.held[len(self.held) - (host.ring.end - first) :]
        assert host.ring.first == first
        assert host.frames == len(held)
        assert host.tokens == sum(len(frame[3]) for frame in held)
        for number, (time, raw, values, positions, places) in enumerate(held, start=first):
            assert (host.time_us(number), host.size(number)) == (time, len(positions))
            assert host.extent(number) == (int(positions[0, 0]) - shift, int(positions[-1, 0]) - shift)
            for index in range(GEOMETRY.layers):
                parts = list(host.pieces(index, number, len(positions), 3))
                assert all(1 <= len(part[3]) <= 3 for part in parts)
                keys, gave = (torch.cat([part[at] for part in parts], dim=1) for at in (0, 1))
                assert torch.allclose(keys, raw[index], atol=1e-4)
                assert torch.equal(gave, values[index])
                assert torch.equal(torch.cat([part[2] for part in parts]), positions - shift)
                assert torch.equal(torch.cat([part[3] for part in parts]), places)
        for index in range(GEOMETRY.layers):
            sums = list(host.key_sums(index, 2))
            assert [at for at, keys, _ in sums for at in range(at, at + keys.shape[1])] == list(
                range(first, host.ring.end)
            )
            want = torch.stack([frame[1][index].sum(1) for frame in held], 1)
            assert torch.allclose(torch.cat([keys for _, keys, _ in sums], 1), want, atol=1e-4)
            assert torch.cat([sizes for *_, sizes in sums]).tolist() == [len(frame[3]) for frame in held]


def test_the_oldest_frames_leave_when_rows_or_slots_are_full() -> None:
    frames = Frames()
    frames.leave((1, 4), (2, 4))
    assert BUDGET - TOKEN < frames.host.nbytes <= BUDGET
    frames.check(0)
    frames.leave((3, 4), (4, 4), (5, 4))
    frames.check(0)  # five frames of four fill it to the last token
    frames.leave((6, 1))
    frames.check(1)  # one row too many
    frames.leave((7, 6))
    frames.check(2)  # 19 tokens of 20
    frames.leave((8, 9))
    frames.check(4)  # 20 again
    assert frames.host.ring.forgotten == 4
    assert frames.host.span == 8, "the longest frame, from its first token to its last"


def test_a_frame_that_leaves_in_parts_is_one() -> None:
    frames = Frames()
    frames.leave((1, 4), (2, 1))
    frames.leave((2, 3), (3, 2))
    frames.leave((3, 2))
    frames.check(0)
    assert frames.host.frames == 3
    frames.leave((3, 20 - 4))
    assert [frames.host.size(number) for number in range(2, 3)] == [20], "all of it, and nothing else"
    frames.check(2)


def test_what_is_larger_than_all_is_forgotten_at_once() -> None:
    frames = Frames()
    frames.leave((1, 4), (2, 21), (3, 4))
    assert (frames.host.frames, frames.host.time_us(0), frames.host.ring.forgotten) == (1, 3, 2)
    several = Frames()
    several.leave(*((time, 1) for time in range(7)))  # of seven frames in one pass the last five
    assert [several.host.time_us(number) for number in range(5)] == [2, 3, 4, 5, 6]
    assert several.host.ring.forgotten == 2


def test_bytes_are_counted_on_the_way_in_and_out() -> None:
    frames = Frames()
    frames.leave((1, 4), (2, 3))
    layer = 2 * 2 * WIDTH * 4  # keys and values of a token's two heads
    assert frames.host.ring.bytes_in == 7 * layer * 2
    list(frames.host.pieces(0, 1, 2, 8))
    assert frames.host.bytes_out == 2 * layer
    list(frames.host.key_sums(1, 8))
    assert frames.host.bytes_out == 2 * layer + 2 * 2 * WIDTH * 4
    assert frames.host.usage()["host_bytes_out"] == frames.host.bytes_out
    assert frames.host.seconds > 0


@pytest.mark.parametrize("in_file", [False, True])
def test_a_state_is_a_copy_that_goes_on_after_a_move(in_file: bool, tmp_path: Path) -> None:
    folder = tmp_path if in_file else None
    frames = Frames(folder=folder)
    frames.leave((1, 4), (2, 4))
    frames.host.move(frames.host.moved(spatial=3, temporal=3))
    frames.check(0, shift=3)
    other = HostCache(GEOMETRY, ROPE, BUDGET, folder)
    state = frames.host.state()
    other.restore(state)
    assert other.usage() == frames.host.usage()
    frames.host.move(frames.host.moved(spatial=5, temporal=5))
    frames.host._keys.zero_()
    frames.host = other
    frames.check(0, shift=3)
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_the_smallest_budget_holds_one_frame_and_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    minimum = SIZE * TOKEN + FRAME
    HostCache.check(GEOMETRY, minimum, SIZE)
    with pytest.raises(BudgetError, match=f"the minimum that works is {minimum} bytes") as caught:
        HostCache.check(GEOMETRY, minimum - 1, SIZE)
    assert caught.value.minimum == minimum
    smallest = Frames(minimum)
    smallest.leave((1, 4))
    smallest.check(0)
    assert smallest.host.nbytes == minimum
    with pytest.raises(BudgetError, match="no file of"):
        Frames(folder=tmp_path / "nowhere").leave((1, 4))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the file's blocks are not reserved here")
def test_a_full_disk_says_so_before_a_frame_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BudgetError, match=r"no file of .* for host memory in .*: .*No space left"):
        Frames(folder=tmp_path).leave((1, 4))
