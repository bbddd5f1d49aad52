"""One stage of training: a loop that can be stopped and resumed, whose every step depends on (seed, stage, step) alone.

Knows nothing about what is learnt: a stage hands in its parameters and a function from a step's random generator to a loss.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Stage", "train"]

_WARMUP = 50
_SAVE_SECONDS = 60.0
_LOG_STEPS = 20


@dataclass(frozen=True)
class Stage:
    """What one stage learns.

    Attributes:
        name: of its files in the run's folder.
        number: tells the stages' random streams apart.
        module: what is saved.
        parameters: what the optimizer moves.
        loss: from a generator, the step and the number of steps to (loss, scores to log).
        steps, rate, decay: number of steps, AdamW's top learning rate, and the last share of steps in which it falls to 0.
    """

    name: str
    number: int
    module: nn.Module
    parameters: list[nn.Parameter]
    loss: Callable[[np.random.Generator, int], tuple[Tensor, dict[str, float]]]
    steps: int
    rate: float
    decay: float
    means: dict[str, list[float]] = field(default_factory=dict)


def train(stage: Stage, run: Path, seed: int, *, until: int | None = None) -> None:
    """Train a stage to its end, from where it was left; log to RUN/NAME.jsonl, save to RUN/NAME.pt about every minute.

    `until` stops it earlier, on the same schedule.
    """
    run.mkdir(parents=True, exist_ok=True)
    saved = run / f"{stage.name}.pt"
    optimizer = torch.optim.AdamW(stage.parameters, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.01)
    step, spent = 0, 0.0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        stage.module.load_state_dict(state["module"])
        step, spent = state["step"], state["seconds"]
        if step < stage.steps:
            optimizer.load_state_dict(state["optimizer"])
        _forget_rows(run / f"{stage.name}.jsonl", step)
    began, last_save = time.monotonic() - spent, time.monotonic()
    stage.module.train()
    end = stage.steps if until is None else min(until, stage.steps)
    while step < end:
        rate = stage.rate * _share(step, stage.steps, stage.decay)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, scores = stage.loss(np.random.default_rng([seed, stage.number, step]), step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(stage.parameters, 1.0)
        optimizer.step()
        step += 1
        for name, value in {"loss": float(loss.detach()), **scores}.items():
            if value == value:
                stage.means.setdefault(name, []).append(value)
        if step % _LOG_STEPS == 0 or step == end:
            row = {name: round(sum(values) / len(values), 4) for name, values in stage.means.items()}
            stage.means.clear()
            seconds = round(time.monotonic() - began, 1)
            with (run / f"{stage.name}.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step, "seconds": seconds, "rate": round(rate, 7), **row}) + "\n")
        if time.monotonic() - last_save > _SAVE_SECONDS or step == end:
            state = {"module": stage.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save({**state, "seconds": time.monotonic() - began}, saved.with_suffix(".part"))
            saved.with_suffix(".part").replace(saved)
            last_save = time.monotonic()


def _forget_rows(log: Path, step: int) -> None:
    """Drop rows of steps that were run after the last save, and will be run again."""
    if log.exists():
        rows = log.read_text(encoding="utf-8").splitlines(keepends=True)
        log.write_text("".join(row for row in rows if json.loads(row)["step"] <= step), encoding="utf-8")


def _share(step: int, steps: int, decay: float) -> float:
    """Warm-up, plateau, linear fall over the last `decay` of the steps."""
    left = (steps - step) / (steps * decay) if decay else 1.0
    return min(1.0, (step + 1) / _WARMUP, left)
