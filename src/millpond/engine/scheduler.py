"""One thread owns the model: it gathers what the sessions' threads wait for, runs it in as few passes as it can, and wakes them.

Questions go before frames; a block of frames that has stood back twice goes along with the next pass. A pass begins when every thread
that could join it is waiting, or has been waited for long enough. Knows requests; no session, no budget, no policy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from millpond.errors import MillpondError
from millpond.models.base import Family, Tokens
from millpond.models.batching import Request, encode_batch, forward_batch, logits_batch

FORWARD_TOKENS = 2048
"""Most tokens of one pass: more would make questions wait longer than their tokens gain."""
_STAND_BACK = 2
# Threads that were served are waited for at most this long, or as long as the last pass took.
_PATIENCE_SECONDS = 0.002

Kind = Literal["logits", "encode", "forward"]
_KINDS: tuple[Kind, ...] = ("logits", "encode", "forward")
_asking: ContextVar[bool] = ContextVar("millpond_engine_asking", default=False)


class _Wanted:
    """What one thread waits for.

    Attributes:
        kind, what: the call, and its arguments as the batching functions take them. size: tokens. urgent: a question's.
        stood_back: passes in which questions went before it. taken: it is being run, or has been.
    """

    def __init__(self, kind: Kind, what: Any, size: int) -> None:
        self.kind, self.what, self.size = kind, what, size
        self.urgent, self.thread, self.stood_back = _asking.get(), threading.get_ident(), 0
        self.taken = False
        self._outcome: Any = None
        self._done = threading.Lock()
        self._done.acquire()

    def finish(self, outcome: Any) -> None:
        """Wake the thread up, with what came of it or an error."""
        self._outcome = outcome
        self._done.release()

    def wait(self) -> Any:
        """What came of it; raises if that is an error."""
        self._done.acquire()
        self._done.release()  # an interrupted wait is repeated
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def settle(self) -> None:
        """Wait for the end, whatever interrupts that: a pass is bounded, and writes to this thread's memory."""
        while self._outcome is None:
            with suppress(BaseException):
                self._done.acquire()
                self._done.release()


class Scheduler:
    """The model's thread.

    Args:
        family: the real one; nobody else runs its model while this does.
        most_tokens: of one pass; with 1 every request runs alone, bit for bit as without an engine.

    Attributes:
        passes, requests: how many ran so far, and for how many requests.
    """

    def __init__(self, family: Family, most_tokens: int = FORWARD_TOKENS) -> None:
        self._family, self._most_tokens = family, most_tokens
        self.passes = self.requests = 0
        self._changed = threading.Condition(threading.Lock())
        self._waiting: list[_Wanted] = []
        self._expected: dict[
            int, bool
        ] = {}  # threads that were served last and may be back soon; whether with a question
        self._until = 0.0  # as long as they are waited for
        self._closed = False
        self._scored = threading.local()
        self._thread = threading.Thread(target=self._run, name="millpond-scheduler", daemon=True)
        self._thread.start()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Within it, what this thread needs of the model is a question's, and goes before frames."""
        token = _asking.set(True)
        try:
            yield
        finally:
            _asking.reset(token)
            self._scored.last = None
            self.leave()

    def forward(self, request: Request) -> Tensor:
        """See `Family.forward`. The last token of a question's is scored along with it, for the `logits` that follow."""
        wanted = _Wanted("forward", request, len(request.tokens))
        hidden: Tensor
        hidden, scores = self._ask(wanted)
        self._scored.last = (hidden, scores) if wanted.urgent else None
        return hidden

    def encode(self, frames: list[np.ndarray], times_us: list[int]) -> Tokens:
        """See `Family.encode`."""
        size = self._family.grid(*frames[0].shape[:2]).tokens * -(-len(frames) // self._family.frames_per_group)
        tokens: Tokens = self._ask(_Wanted("encode", (frames, times_us), size))
        return tokens

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Family.logits`; one hidden state, [hidden]."""
        scored, self._scored.last = getattr(self._scored, "last", None), None
        scores: Tensor
        # The tensor is still there, so that nothing else can have its place.
        if scored is not None and scored[0][-1].data_ptr() == hidden.data_ptr():
            scores = scored[1]
        else:
            scores = self._ask(_Wanted("logits", hidden, 1))
        return scores

    def leave(self) -> None:
        """This thread wants nothing more for now: nobody waits for it."""
        with self._changed:
            if self._expected.pop(threading.get_ident(), None) is not None:
                self._changed.notify()

    def close(self) -> None:
        """End the thread, behind a pass that runs; whoever waits is told."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not threading.current_thread():  # where an engine is collected
            self._thread.join()

    def _ask(self, wanted: _Wanted) -> Any:
        try:
            with self._changed:
                if self._closed:
                    raise MillpondError("the engine is closed")
                self._waiting.append(wanted)
                self._expected.pop(wanted.thread, None)
                self._changed.notify()
            return wanted.wait()
        except BaseException:  # Ctrl-C, most of all
            with self._changed:
                if wanted in self._waiting:
                    self._waiting.remove(wanted)
            if wanted.taken:
                wanted.settle()
            raise

    def _run(self) -> None:
        with torch.no_grad():
            while True:
                with self._changed:
                    batch = self._next()
                if batch is None:
                    return
                began = perf_counter()
                outcomes = self._serve(batch)
                ended = perf_counter()
                with self._changed:
                    self.passes += 1
                    self.requests += len(batch)
                    self._expected.update((wanted.thread, wanted.urgent) for wanted in batch)
                    self._until = ended + max(_PATIENCE_SECONDS, ended - began)
                    for wanted, outcome in zip(batch, outcomes, strict=True):
                        wanted.finish(outcome)
                # Nothing of a session's is held while nobody waits.
                del batch, outcomes, wanted, outcome

    def _next(self) -> list[_Wanted] | None:
        """The next pass, when it is time for it; None at the end."""
        while True:
            if self._closed:
                for wanted in self._waiting:
                    wanted.finish(MillpondError("the engine was closed meanwhile"))
                self._waiting.clear()
                return None
            now = perf_counter()
            if now >= self._until:
                self._expected.clear()
            if not self._waiting:
                self._changed.wait()
                continue
            asked = any(wanted.urgent for wanted in self._waiting)
            if any(urgent or not asked for urgent in self._expected.values()):
                self._changed.wait(self._until - now)
                continue
            return self._pick(asked)

    def _pick(self, asked: bool) -> list[_Wanted]:
        """Which of those that wait run now: all of one kind, as many as fit, questions first."""
        due = [wanted for wanted in self._waiting if wanted.urgent or not asked or wanted.stood_back >= _STAND_BACK]
        kind = next(kind for kind in _KINDS if any(wanted.kind == kind for wanted in due))
        batch: list[_Wanted] = []
        for wanted in sorted((one for one in due if one.kind == kind), key=lambda one: not one.urgent):
            if batch and sum(one.size for one in batch) + wanted.size > self._most_tokens:
                continue
            batch.append(wanted)
        for wanted in batch:
            wanted.taken = True
            self._waiting.remove(wanted)
        for wanted in self._waiting:
            wanted.stood_back += asked
        return batch

    def _serve(self, batch: Sequence[_Wanted]) -> Sequence[Any]:
        """What comes of each: a result, or the error that is its own."""
        what = [wanted.what for wanted in batch]
        try:
            if batch[0].kind == "encode":
                return encode_batch(self._family, what)
            if batch[0].kind == "logits":
                return logits_batch(self._family, what)
            outcomes: list[Any] = [
                hidden if isinstance(hidden, Exception) else (hidden, None)
                for hidden in _forward_each(self._family, what)
            ]
            # A cache that is only filled gives no hidden state.
            asked = [
                at
                for at, one in enumerate(batch)
                if one.urgent and not isinstance(outcomes[at], Exception) and len(outcomes[at][0])
            ]
            scored = logits_batch(self._family, [outcomes[at][0][-1] for at in asked])
            for at, scores in zip(asked, scored, strict=True):
                outcomes[at] = scores if isinstance(scores, Exception) else (outcomes[at][0], scores)
            return outcomes
        except BaseException as error:  # whatever it is, nobody may be left waiting
            return [error] * len(batch)


def _forward_each(family: Family, requests: Sequence[Request]) -> Sequence[Tensor | Exception]:
    """A pass; where the model fails in the midst of several, each again by itself, so that only whose fault it is sees it."""
    lengths = [request.cache.length for request in requests]
    try:
        return forward_batch(family, requests)
    except Exception as error:
        if len(requests) == 1:
            return [error]
        failed = error
    outcomes: list[Tensor | Exception] = []
    for request, length in zip(requests, lengths, strict=True):
        if request.see is None:
            request.cache.truncate(length)
            outcomes += _forward_each(family, [request])
        else:
            outcomes.append(failed)  # what it has shown of its queries cannot be taken back here
    return outcomes
