"""Every operation's kernel and its reference say the same, for any dtype, layout and size; and which of them runs."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import millpond
from millpond import ops
from millpond.ops import build, dispatch
from millpond.ops.dispatch import DECLINED, Operation
from tests.ops.cases import CASES, Case, Draw

SEEDS = 60
compiled_only = pytest.mark.skipif(not ops.status().endswith(".so"), reason=f"no compiled kernels: {ops.status()}")


def same(one: Any, other: Any, close: dict[str, float]) -> bool:
    """Whether two nests of tensors and numbers are equal, or as close as that."""
    if isinstance(one, Tensor):
        if close and one.dtype.is_floating_point:
            return torch.allclose(one, other, equal_nan=True, **close)
        return (
            one.dtype == other.dtype
            and torch.equal(one.isnan(), other.isnan())
            and torch.equal(one.nan_to_num(0), other.nan_to_num(0))
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b, close) for a, b in zip(one, other, strict=True))
    return one is None or bool(one == other)


def tensors(case: Case) -> list[Any]:
    """The arguments that may have changed."""
    return [each for each in case.arguments if isinstance(each, Tensor | list)]


def run(name: str, seed: int, how: Any) -> tuple[Any, list[Any]]:
    """What a function gives for a case, drawn anew, and the arguments afterwards."""
    case = CASES[name](Draw(seed))
    return how(*case.arguments, **case.named), tensors(case)


@pytest.mark.parametrize("name", sorted(ops.OPERATIONS))
def test_every_operation_has_cases_and_a_kernel(name: str) -> None:
    assert name in CASES, f"{name} has no cases in tests/ops/cases.py"
    assert ops.OPERATIONS[name].kernels, f"{name} has no kernel: it can be a plain function"


@compiled_only
@pytest.mark.parametrize("name", sorted(CASES))
def test_kernel_and_reference_say_the_same(name: str) -> None:
    operation = ops.OPERATIONS[name]
    taken = 0
    for seed in range(SEEDS):
        case = CASES[name](Draw(seed))
        found, changed = run(name, seed, operation.kernels["cpu"])
        if found is DECLINED:
            assert same(changed, tensors(case), {}), f"seed {seed}: it declined, and changed its arguments"
            continue
        taken += 1
        wanted, reference = run(name, seed, operation.reference)
        assert same(case.seen(found), case.seen(wanted), case.close), f"seed {seed}: {found} is not {wanted}"
        assert same(changed, reference, case.close), f"seed {seed}: the arguments differ"
    assert taken >= SEEDS // 4, f"the kernel took {taken} of {SEEDS} cases"


@compiled_only
@pytest.mark.parametrize("name", sorted(CASES))
def test_what_a_kernel_declines_goes_to_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = ops.OPERATIONS[name]
    monkeypatch.setattr(operation, "reference", lambda *_, **__: "reference")
    for seed in range(SEEDS // 2):
        declined = run(name, seed, operation.kernels["cpu"])[0] is DECLINED
        assert (str(run(name, seed, operation)[0]) == "reference") == declined


def test_switched_off_every_operation_runs_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(dispatch, "kernels_enabled", False)
    for name, operation in ops.OPERATIONS.items():
        monkeypatch.setattr(operation, "_on_cpu", never)
        run(name, 0, operation)
    monkeypatch.setattr(dispatch, "kernels_enabled", True)
    with pytest.raises(AssertionError, match="a kernel ran"):
        run("best", 0, ops.best)


def test_the_environment_switches_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, enabled in (("0", False), ("1", True)):
        monkeypatch.setenv("MILLPOND_NATIVE", value)
        assert runpy.run_path(dispatch.__file__)["kernels_enabled"] is enabled
    monkeypatch.setenv("MILLPOND_NATIVE", "0")
    assert build.compiled.__wrapped__(ops.sources()[0]) == (None, "switched off by MILLPOND_NATIVE=0")


def test_a_device_without_a_kernel_runs_the_reference() -> None:
    def reference(x: Tensor) -> str:
        return "reference"

    made = Operation(reference)

    @made.kernel("cpu")
    def on_cpu(x: Tensor) -> str:
        return "cpu"

    assert made(torch.zeros(1)) == "cpu"
    assert made(torch.zeros(1, device="meta")) == "reference"

    @made.kernel("meta")
    def on_meta(x: Tensor) -> str:
        return "meta"

    assert made(torch.zeros(1, device="meta")) == "meta"


@compiled_only
@pytest.mark.parametrize("source", sorted(Path(millpond.__file__).parent.rglob("*.cpp")), ids=lambda path: path.name)
def test_every_file_compiles_where_one_does(source: Path) -> None:
    library, why = build.compiled(source)
    assert library is not None, why
    assert source in ops.sources()


def test_without_a_home_folder_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    library, why = build.compiled.__wrapped__(ops.sources()[0])
    assert library is None
    assert "could not be built" in why or "no C++ compiler" in why
