"""What to forget, by a rule of your own: python examples/own_policy.py

A package registers such a class under the entry point group `millpond.policies`; then `--policy loudest` finds it too.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import millpond
from millpond import minnow
from millpond.eval import streams
from millpond.policies import Scorer, View
from millpond.policies.base import Shape


@dataclass(frozen=True)
class Loudest(Scorer):
    """Keep the tokens whose values are longest, in each head by itself."""

    name: ClassVar[str] = "loudest"
    source: ClassVar[str] = "this example"

    def score(self, view: View) -> Tensor:
        scores = torch.empty(view.heads, view.tokens, device=view.values.device)
        for values, row in zip(view.values, scores, strict=True):
            for part, out in zip(values.split(view.chunk), row.split(view.chunk), strict=True):
                out.copy_(part.float().norm(dim=-1))
        return scores

    def scratch(self, shape: Shape) -> int:
        # The choice among the scores, and a chunk of values in float32 with its norms; all of it counts against the cap.
        return super().scratch(shape) + 4 * shape.chunk * (shape.head_dim + 1)


def main(seconds: int = 96) -> None:
    stream = streams.generate(11, groups=seconds, level="standard")
    questions = [question for question in stream.questions if question.type in minnow.SUPPORTED]
    for policy in (Loudest(), "infinipot-v"):
        session = millpond.Session.from_pretrained("minnow", budget="256KiB", policy=policy)
        session.feed(stream.frames())
        right = sum(session.ask(one.text, max_new_tokens=4).text.strip() == one.answer for one in questions)
        print(f"{session.policy.name}: {right} of {len(questions)} right in {session.usage.peak_bytes} bytes")


if __name__ == "__main__":
    main()
