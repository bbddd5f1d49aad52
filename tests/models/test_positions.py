"""Positions over long streams, from the frames to the stored keys: what must hold for every family, kind of policy and mode."""

from collections import defaultdict
from typing import Any, Literal

import pytest
import torch

from millpond import Session
from millpond.cache import Pond
from millpond.policies.base import TEXT, Policy
from millpond.policies.methods.mikv import MiKV
from tests.models.tiny import tiny
from tests.session.frames import moving


class Witness:
    """Notes every key that a pond is given, rotation taken out in float64, by layer, head and value."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rope = session.family.rope
        self.raw: dict[tuple[int, int, bytes], torch.Tensor] = {}
        write_metadata, update = Pond.write_metadata, Pond.update

        def announced(pond: Pond, times: torch.Tensor, grid_position: torch.Tensor, positions: torch.Tensor) -> None:
            self.positions = positions.T
            write_metadata(pond, times, grid_position, positions)

        def updated(pond: Pond, keys: torch.Tensor, values: torch.Tensor, index: int, *rest: Any, **more: Any) -> Any:
            for head in range(keys.shape[1]):
                raw = self.turned(keys[0, head], -self.positions)
                for key, value in zip(raw, values[0, head], strict=True):
                    self.raw[index, head, value.numpy().tobytes()] = key
            return update(pond, keys, values, index, *rest, **more)

        monkeypatch.setattr(Pond, "write_metadata", announced)
        monkeypatch.setattr(Pond, "update", updated)

    def turned(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angle = positions.double()[:, self.rope.axis] * self.rope.inv_freq.double()
        half = angle.shape[1]
        turned = torch.complex(keys[:, :half].double(), keys[:, half:].double()) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.cat([turned.real, turned.imag], dim=1)

    def worst(self, pond: Pond) -> float:
        """The largest difference between a stored key and the same key computed at its stored position."""
        worst = 0.0
        for index, layer in enumerate(pond.layers):
            for head in range(layer.positions.shape[0]):
                values = layer.values[0, head, : layer.length]
                raw = torch.stack([self.raw[index, head, value.numpy().tobytes()] for value in values])
                fresh = self.turned(raw, layer.positions[head, : layer.length])
                worst = max(worst, float((layer.keys[0, head, : layer.length].double() - fresh).abs().max()))
        return worst


def check(session: Session) -> None:
    pond, clock = session._runner.pond, session._runner.clock
    for layer in pond.layers:
        for head in range(layer.positions.shape[0]):
            # A tier keeps packed and full tokens apart; `in_order` puts them together, and so does this.
            at, grid_position = (part.long() for part in layer.in_order(head))
            assert int(at.max()) < clock.next
            if session._runner.positions == "contiguous":
                assert int(at.min()) == 0
            times = layer.time_us[head, : layer.length]
            if len(times) < len(at):
                continue
            visual = grid_position[:, 0] > TEXT
            groups: dict[int, list[int]] = defaultdict(list)
            for index in visual.nonzero()[:, 0].tolist():
                groups[int(times[index])].append(index)
            if at.shape[1] > 1:
                assert bool((at[~visual] == at[~visual][:, :1]).all())
                for group in groups.values():
                    assert len(at[group, 0].unique()) == 1
                    assert len((at[group, 1:] - grid_position[group]).unique()) == 1
            later = times.diff() > 0
            assert bool((times.diff() >= 0).all())
            assert bool((at[:, 0].diff()[later] > 0).all())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy", "mode", "budget", "limit", "count", "minimum"),
    [
        ("qwen2_5_vl", "infinipot-v", "contiguous", 110, 200, 200, 2),
        ("qwen3_vl", MiKV(full_share=0.6), "contiguous", 400, 800, 100, 1),
        ("qwen3_vl", "infinipot-v", "contiguous", 160, 400, 110, 2),
        ("qwen3_vl", "infinipot-v", "absolute", 200, 400, 60, 2),
        ("llava_onevision", "infinipot-v", "contiguous", 80, 300, 60, 2),
    ],
)
def test_positions_and_keys_of_a_long_stream(
    name: str,
    policy: str | Policy,
    mode: Literal["contiguous", "absolute"],
    budget: int,
    limit: int,
    count: int,
    minimum: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = tiny(name, max_position_embeddings=limit)
    session = Session(family, budget=budget << 10, policy=policy, positions=mode, reserve_tokens=32)
    witness = Witness(session, monkeypatch)
    before = 0
    for index, frame in enumerate(moving(count, fps=2, height=28, width=42)):
        session.feed(frame)
        if index % 60 == 50:
            session.ask("so", max_new_tokens=4, remember=True)
        if session.usage.reanchorings > before:
            before = session.usage.reanchorings
            check(session)
    assert before >= minimum
    if not session._runner.policy.needs.quantized_tier:
        assert witness.worst(session._runner.pond) <= 1e-4
