"""An answer, token by token, and its ids as pieces of text."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

from torch import Tensor

from millpond.models.base import Tokens
from millpond.stream.runner import Runner
from millpond.stream.stored_tokens import dated


@dataclass
class Generated:
    """What was generated.

    Attributes:
        text: all of it. token_ids: without the stop token.
        finish_reason: "stop" when the model ended by itself, "length" at the limit or the end of the reserve.
        first: `perf_counter` when the first token was there; 0 without any.
        ran: how many of the tokens have run and lie in the pond.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "length"
    first: float = 0.0
    ran: int = 0


def generate(
    runner: Runner, run: Callable[[Tokens], Tensor], hidden: Tensor | None, time_us: int, *, limit: int, run_last: bool
) -> Generator[str, None, Generated]:
    """Greedy decoding behind what is in the pond; yields what each token adds to the text, perhaps nothing, and returns the whole.

    No tensor is held while a piece is out.

    Args:
        run: one forward; gives hidden states [n, hidden].
        hidden: [n, hidden] of what ran last; the caller lets go of it. time_us: stream time at which the tokens are said.
        limit: most tokens. run_last: also run the last one, so that it can be remembered.
    """
    done, text = Generated(), TextPieces(runner.family.tokenizer)
    while hidden is not None and len(done.token_ids) < limit:
        token = int(runner.family.logits(hidden[-1]).argmax())
        hidden = None
        if token in runner.family.stop_ids:
            done.finish_reason = "stop"
            break
        done.token_ids.append(token)
        done.first = done.first or perf_counter()
        yield text.push(token)
        if runner.pond.free == 0 or (len(done.token_ids) == limit and not run_last):
            break
        hidden = run(dated(runner.family.embed([token]), time_us))
        done.ran += 1
    hidden = None
    if rest := text.finish():
        yield rest
    done.text = text.whole
    return done


class TextPieces:
    """Turns a growing list of token ids into pieces of text whose concatenation is the whole.

    A byte-level tokenizer may need several tokens for one character; a piece is held back while it ends in one that is not
    finished.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.whole = ""

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now, possibly empty."""
        self._ids.append(token)
        text = self._decode()
        return "" if text.endswith("\ufffd") else self._emit(text)

    def finish(self) -> str:
        """What was held back."""
        return self._emit(self._decode())

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text

    def _emit(self, text: str) -> str:
        piece, self.whole = text[len(self.whole) :], text
        return piece
