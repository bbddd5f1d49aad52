"""A model of lmms-eval that watches each video under a budget and answers from what it remembers.

Knows lmms-eval's requests and millpond's sessions; nothing about tasks and scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from millpond import frames, models
from millpond.config import SessionConfig
from millpond.errors import MillpondError
from millpond.frames import Frame
from millpond.memory.budget import Budget
from millpond.policies import DEFAULT_POLICY
from millpond.session import Session

_ANSWER_TOKENS = 128
_GREEDY: dict[str, tuple[Any, ...]] = {
    "do_sample": (False, None),
    "temperature": (0, None),
    "num_beams": (1, None),
}
"""What a task may ask of decoding: nothing but the likeliest token each time."""
_TAKEN = {"max_new_tokens", "until", "top_p", "top_k", *_GREEDY}


class Millpond(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """`--model millpond --model_args pretrained=FOLDER,budget=64MiB,policy=keydiff,...`

    Questions about the video that was watched last are asked of the same memory: it is watched once.

    Args:
        pretrained: the model, as `millpond.models.load` takes it. budget: bytes of a stream.
        policy, positions, recent_frames, host_budget, reserve_tokens: as in a `SessionConfig`.
        fps: frames taken a second. max_frames: of a longer video fewer are taken.
        dtype, device, max_pixels: as in `millpond.models.load`.
        batch_size, max_batch_size: given by lmms-eval; requests are answered one after the other.

    Raises:
        MillpondError: an argument that there is not, by name; and as for a `SessionConfig`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "minnow",
        budget: str | int | None = None,
        policy: str = DEFAULT_POLICY,
        positions: str = "contiguous",
        recent_frames: int = 0,
        host_budget: str | int | None = None,
        reserve_tokens: int | None = None,
        fps: float = 2.0,
        max_frames: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        max_pixels: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            known = "pretrained, budget, policy, positions, recent_frames, host_budget, reserve_tokens, fps, max_frames, dtype, device, max_pixels"
            raise MillpondError(f"millpond has no model argument {sorted(others)[0]!r}; it has: {known}")
        if str(batch_size) not in ("1", "auto"):
            raise MillpondError(f"batch_size must be 1, not {batch_size}: requests are answered one after the other")
        if budget is None and policy != "full":
            raise MillpondError("give a budget, such as budget=64MiB")
        self._config = SessionConfig(
            budget=None if budget is None else int(Budget(budget)),
            policy=policy,  # type: ignore[arg-type]
            positions=positions,  # type: ignore[arg-type]
            recent_frames=recent_frames,
            host_budget=host_budget,  # type: ignore[arg-type]
            reserve_tokens=reserve_tokens,
        )
        self._fps, self._max_frames = fps, max_frames
        self._family = models.load(pretrained, dtype=dtype, device=device, max_pixels=max_pixels)
        self._watched: tuple[Any, ...] | None = None
        self._session: Session | None = None

    # --- requests ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any]) -> list[str]:
        """One answer a request."""
        answers = []
        for request in tqdm(requests, desc="millpond", disable=self.rank != 0):
            context, doc_to_messages, options, doc_id, task, split = request.args
            answer = self._answer(doc_to_messages(self.task_dict[task][split][doc_id]), options)
            self.cache_hook.add_partial("generate_until", (context, options), answer)
            answers.append(answer)
        return answers

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """One list of answers a request: the task says after each round what comes next, or that nothing does."""
        everything = []
        for request in tqdm(requests, desc="millpond", disable=self.rank != 0):
            _, doc_to_messages, options, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            said, told = [self._answer(doc_to_messages(doc), options)], None
            while True:
                following = doc_to_messages(doc, round_idx=len(said), previous_output=[*said], previous_round_info=told)
                if not (isinstance(following, tuple) and len(following) == 4):
                    break
                messages, over, _, told = following
                if over:
                    break
                said.append(self._answer(messages, options))
            everything.append(said)
        return everything

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not to be had.

        Raises:
            MillpondError: always.
        """
        raise MillpondError("millpond answers, it gives no likelihoods: choose a task with output_type generate_until")

    # --- one answer -------------------------------------------------------------------------------------------------

    def _answer(self, messages: Any, options: dict[str, Any]) -> str:
        limit = _decoding(options)
        chat = ChatMessages(messages=messages)
        system, question, media = "", [], []
        for message in chat.messages:
            if message.role == "assistant":
                raise MillpondError("millpond is shown one question at a time, no answers in front of it")
            for part in message.content:
                if part.type == "audio":
                    raise MillpondError("millpond hears nothing: audio cannot be shown to it")
                if part.type != "text":
                    media.append(part)
                elif message.role == "system":
                    system += part.text
                else:
                    question.append(part.text)
        session = self._shown(media, system or None)
        text = session.ask("\n".join(question), max_new_tokens=limit).text
        for stop in _stops(options):
            text = text.partition(stop)[0]
        return text

    def _shown(self, media: list[Any], system: str | None) -> Session:
        """A session that has watched this; the last one where it has watched the same."""
        seen = (
            system,
            *((part.type, part.url if part.type == "video" else id(part.url), *_span(part)) for part in media),
        )
        if self._session is None or seen != self._watched:
            self._session, self._watched = None, None
            session = Session(self._family, replace(self._config, system=system))
            for part in media:
                if part.type == "video":
                    with frames.open(part.url, fps=self._rate(part.url)) as source:
                        session.feed(_within(source, *_span(part)))
            pictures = [part.url for part in media if part.type == "image"]
            if pictures:
                session.feed([(float(at), np.asarray(one.convert("RGB"))) for at, one in enumerate(pictures)])
            self._session, self._watched = session, seen
            self._pictures = pictures  # held, so that no other gets the same id
        return self._session

    def _rate(self, path: str) -> float:
        if self._max_frames is None:
            return self._fps
        with frames.open(path, fps=self._fps) as source:
            length = source.info.duration
        return min(self._fps, self._max_frames / length) if length else self._fps


def _decoding(options: dict[str, Any]) -> int:
    """The longest answer in tokens.

    Raises:
        MillpondError: the task asks for something else than greedy decoding, by name.
    """
    for name, value in options.items():
        if name not in _TAKEN:
            raise MillpondError(f"millpond has no generation option {name!r}; it has: {', '.join(sorted(_TAKEN))}")
        if name in _GREEDY and value not in _GREEDY[name]:
            raise MillpondError(f"millpond decodes greedily: {name} cannot be {value!r}")
    return int(options.get("max_new_tokens") or _ANSWER_TOKENS)


def _stops(options: dict[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _span(part: Any) -> tuple[float | None, float | None]:
    """From when to when a part of a video is shown; newer releases say so."""
    return getattr(part, "start_time", None), getattr(part, "end_time", None)


def _within(source: Iterable[Frame], start: float | None, end: float | None) -> Iterator[Frame]:
    for frame in source:
        if end is not None and frame.seconds >= end:
            return
        if start is None or frame.seconds >= start:
            yield frame
