"""A snapshot of another session than the one that is wanted is refused, and what differs is said; what may differ, may."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from millpond import BudgetError, MillpondError, Session, SnapshotError
from millpond.admission import Admission, Verdict
from millpond.models.base import Family
from millpond.policies.base import Scorer, View
from tests.models.tiny import tiny
from tests.session.frames import moving
from tests.snapshot.forging import parts, refused
from tests.snapshot.test_matrix import bits

# --- another model, another policy ----------------------------------------------------------------------------------


def test_another_model_or_dtype_says_what_differs(small: bytes, family: Family, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(small)
    assert "its weights differ" in refused(path, tiny("qwen2_5_vl", seed=1))
    assert "dtype 'float32', and this model's is 'bfloat16'" in refused(path, tiny("qwen2_5_vl", dtype=torch.bfloat16))
    assert "family 'Qwen2.5-VL'" in refused(path, tiny("qwen2_vl"))
    assert "max_position_embeddings was 32768, and is 99 here" in refused(
        path, tiny("qwen2_5_vl", max_position_embeddings=99)
    ) or "limit was 32768" in refused(path, tiny("qwen2_5_vl", max_position_embeddings=99))
    other = tiny("qwen2_5_vl")
    other.max_pixels //= 4  # type: ignore[attr-defined]
    assert "it resizes frames differently" in refused(path, other)
    other = tiny("qwen2_5_vl")
    with torch.no_grad():
        other.model.get_input_embeddings().weight[0, 0] += 1
    assert "its weights differ" in refused(path, other)
    Session.load(path, tiny("qwen2_5_vl", attn_implementation="eager"))
    model = tiny("qwen2_5_vl")
    Session.load(path, (model.model, model.tokenizer, {"min_pixels": 196, "max_pixels": 19600}))


def test_other_arguments_say_what_differs(small: bytes, family: Family, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(small)
    same = {"policy": "infinipot-v", "positions": "contiguous", "recent_frames": 2, "admission": "curvestream"}
    Session.load(path, family, system=None, **same)  # type: ignore[arg-type]
    assert "with 'infinipot-v', not 'recent'" in refused(path, family, policy="recent")
    line = refused(path, family, policy="infinipot-v:alpha=0.25")
    assert "infinipot-v alpha: it was" in line
    assert "is 0.25" in line
    assert "curvestream k: it was 1.0 and is 2.0" in refused(path, family, admission="curvestream:k=2.0")
    assert "with 'curvestream', not 'none'" in refused(path, family, admission=None)
    assert "recent_frames 2, not 0" in refused(path, family, recent_frames=0)
    assert "system None, not 'be brief'" in refused(path, family, system="be brief")
    assert "no argument 'polcy'" in refused(path, family, polcy="recent")
    assert "host_budget None, not 1048576" in refused(path, family, host_budget="1MiB")
    with pytest.raises(BudgetError, match="minimum"):
        Session.load(path, family, budget=1000)


@dataclass(frozen=True)
class Loudest(Scorer):
    """A policy that no package registers."""

    name: ClassVar[str] = "loudest"
    power: float = 2.0

    def score(self, view: View) -> Tensor:
        return view.values.float().norm(dim=2) ** self.power


@dataclass(frozen=True)
class Count:
    """What `Halves` remembers."""

    groups: int
    last: tuple[float, Tensor] | None = None
    least: float = float("inf")


@dataclass(frozen=True)
class Halves(Admission):
    """Thins every second group."""

    name: ClassVar[str] = "halves"
    source: ClassVar[str] = "this test"
    state_types: ClassVar[tuple[type, ...]] = (Count,)

    def judge(self, feature: Tensor, state: Count | None) -> tuple[Verdict, Count]:
        count = 0 if state is None else state.groups
        return "reduced" if count % 2 else "clear", Count(count + 1, (float(feature[0]), feature))

    def state_bytes(self, hidden: int) -> int:
        return 4 * hidden


def test_a_policy_and_an_admission_of_ones_own(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    session = Session(family, budget="300KiB", policy=Loudest(), admission=Halves())
    session.feed(list(moving(31)))
    session.save(path)
    assert "policy 'loudest', which no package registers: load it with policy=" in refused(path, family)
    assert "admission 'halves', which no package" in refused(path, family, policy=Loudest())
    assert "loudest power: it was 2.0 and is 3.0" in refused(path, family, policy=Loudest(3.0), admission=Halves())
    loaded = Session.load(path, family, policy=Loudest(), admission=Halves())
    for one in (session, loaded):
        one.feed(list(moving(6, start=60)))
    assert session.usage.compactions > 0
    assert bits(loaded) == bits(session)


def test_an_admission_that_remembers_what_cannot_be_saved_is_refused_by_name(family: Family, tmp_path: Path) -> None:
    class Locked(Halves):
        def judge(self, feature: Tensor, state: Any) -> tuple[Verdict, Any]:
            return "clear", threading.Lock()

    path = tmp_path / "saved"
    session = Session(family, budget="300KiB", policy="recent", admission=Locked())
    session.feed(list(moving(4)))
    with pytest.raises(SnapshotError, match="lock cannot be saved"):
        session.save(path)
    assert not path.exists()


# --- what else may read it ------------------------------------------------------------------------------------------


def test_the_safetensors_library_reads_it(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(small)
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"checksum", "format", "version", "session"}
        keys = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    length = parts(small)[1]["stream"]["layers"][0][0]
    assert keys["layers.2.keys"].shape == (2, length, 16)
    assert keys["layers.2.keys"].dtype == torch.float32


def test_a_load_that_fails_in_the_middle_leaves_nothing(small: bytes, family: Family, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(small)
    with pytest.raises(MillpondError):
        Session.load(path, family, budget=1)
    assert path.read_bytes() == small
    Session.load(path, family)
