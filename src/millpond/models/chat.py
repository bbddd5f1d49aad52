"""The prompt's layout, read off a chat template: what stands before a video, after it, and between turns.

Nothing is hard-coded: conversations with a video are rendered and tokenized whole, and split at the video's token, so that the
pieces joined around the frames are token for token what the template gives. Knows nothing about models or positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from millpond.errors import MillpondError, ModelError
from millpond.models.literal import Encoded, Literal

_SAID = "millpond-said-this"
_SLOT = "millpond-asks-this"


class Chat:
    """A tokenizer, its chat template, and the id that stands for the video in it.

    Args:
        tokenizer: of the model.
        video_id: the placeholder's token id.
        template: the chat template where the tokenizer has none of its own (some checkpoints keep it with the processor).

    Raises:
        ModelError: there is no template, or it does not show a video as exactly one token.
    """

    def __init__(self, tokenizer: Any, video_id: int, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._video_id = video_id
        self._template = template
        if not (template or getattr(tokenizer, "chat_template", None)):
            raise ModelError("the model's tokenizer has no chat template: save one beside it (chat_template.jinja)")
        known = tokenizer.convert_ids_to_tokens(video_id)
        if not isinstance(known, str):
            raise ModelError(
                f"the tokenizer does not know the model's video token, id {video_id}: it is another model's"
            )
        self._video_text = known
        # What stands for a word that is not known is none: any text may hold it, and it ends no turn.
        self._controls = frozenset(tokenizer.added_tokens_decoder) - {getattr(tokenizer, "unk_token_id", None)}
        self._literal: Literal | None = None
        # What the tokenizer puts in front of every text; what it puts behind is left out.
        bare, framed = self.text_ids(_SLOT), list(tokenizer(_SLOT)["input_ids"])
        self._begin = framed[: next((at for at in range(len(framed)) if framed[at : at + len(bare)] == bare), 0)]
        if self._render([_user("x", video=True)]).count(known) != 1:
            raise ModelError(f"the chat template does not show a video as one {known!r}")
        self.before_video(None)

    def before_video(self, system: str | None) -> list[int]:
        """Ids of everything before the first frame."""
        video = _user("x", video=True)
        if not system:
            ids = self._ids(lambda _: [video], "")
        else:
            ids = self._ids(
                lambda text: [{"role": "system", "content": [{"type": "text", "text": text}]}, video], system
            )
        return ids[: self._at(ids)]

    def after_video(self, question: str) -> list[int]:
        """Ids from the end of the video to the start of the answer."""
        ids = self._ids(lambda text: [_user(text, video=True)], question)
        return ids[self._at(ids) + 1 :]

    def next_turn(self, question: str) -> list[int]:
        """Ids from the end of an answer through another question, without a video, to the start of its answer."""
        return self._after_answer(lambda text: _user(text, video=False), question)

    def next_video(self) -> list[int]:
        """Ids from the end of an answer to the next frame."""
        return list(self._next_video)

    @cached_property
    def _next_video(self) -> tuple[int, ...]:
        ids = self._after_answer(lambda _: _user("x", video=True), "")
        return tuple(ids[: self._at(ids)])

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text, special tokens recognised."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _after_answer(self, turn: Callable[[str], dict[str, Any]], text: str) -> list[int]:
        """Ids of a further turn, from the last character of the answer on.

        They are cut out of the whole conversation's ids, since many tokenizers treat the start of a text in a way of their own.
        Where a token reaches across the cut, and where a tokenizer does not tell its tokens' offsets, the rest is tokenized alone.
        """

        def whole(text: str) -> str:
            rendered = self._render([_user("x", video=True), _assistant(_SAID), turn(text)])
            if _SAID not in rendered:
                raise ModelError("the chat template does not show the answers of earlier turns")
            return rendered

        said = self._encode(whole, text)
        cut = said.text.index(_SAID) + len(_SAID)
        first = next((at for at, (_, end) in enumerate(said.offsets) if end > cut), len(said.offsets))
        across = said.offsets[first : first + 1] and said.offsets[first][0] < cut
        if across or not said.offsets:
            return self._encode(lambda text: whole(text).partition(_SAID)[2], text).ids
        return said.ids[first:]

    def _encode(self, render: Callable[[str], str], text: str) -> Encoded:
        """A conversation with a user's text in it, tokenized; control tokens that the text spells are text.

        Raises:
            MillpondError: it spells some, and this tokenizer or template offers no way to keep them apart.
        """
        said = self._tokenized(render(text))
        if not text:
            return said
        slotted = render(_SLOT)
        wanted = self._count(self._tokenized(slotted).ids)
        if self._count(said.ids) == wanted:
            return said
        if getattr(self._tokenizer, "is_fast", False) and slotted.count(_SLOT) == 1:
            self._literal = self._literal or Literal(self._tokenizer)
            before, behind = slotted.split(_SLOT)
            said = self._literal.encode(before, behind, text)
            if self._count(said.ids) == wanted:
                return said
        raise MillpondError("a question or system message must not contain the model's control tokens")

    def _tokenized(self, text: str) -> Encoded:
        fast = getattr(self._tokenizer, "is_fast", False)
        said = self._tokenizer(text, add_special_tokens=False, **({"return_offsets_mapping": True} if fast else {}))
        return Encoded(list(said["input_ids"]), said["offset_mapping"] if fast else [], text)

    def _count(self, ids: list[int]) -> int:
        """How many control tokens there are among ids."""
        return sum(id_ in self._controls for id_ in ids)

    def _at(self, ids: list[int]) -> int:
        if ids.count(self._video_id) != 1:
            raise ModelError(f"the tokenizer does not keep {self._video_text!r} as one token")
        return ids.index(self._video_id)

    def _render(self, turns: list[dict[str, Any]]) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program of its own
            raise ModelError(f"the chat template cannot render a turn with a video: {error}") from error
        return text

    def _ids(self, turns: Callable[[str], list[dict[str, Any]]], text: str) -> list[int]:
        """Ids of a whole conversation with a user's text in it, and of what the tokenizer puts in front of every text."""
        ids = self._encode(lambda text: self._render(turns(text)), text).ids
        # A template may write the beginning-of-sequence token itself; it must not stand there twice.
        bos = getattr(self._tokenizer, "bos_token_id", None)
        return ids if bos is not None and ids[:1] == [bos] else [*self._begin, *ids]


def _user(text: str, *, video: bool) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "video"}] if video else []
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
