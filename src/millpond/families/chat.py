"""The prompt's layout, read off a chat template: what stands before a video, after it, and between turns.

Nothing is hard-coded: conversations with a video are rendered and tokenized whole, and split at the video's token, so that the
pieces joined around the frames are token for token what the template gives. Knows nothing about models or positions.
"""

from __future__ import annotations

from typing import Any

from millpond.errors import MillpondError, ModelError

__all__ = ["Chat"]

_SAID = "millpond-said-this"


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
        if self._render([_user("x", video=True)]).count(known) != 1:
            raise ModelError(f"the chat template does not show a video as one {known!r}")
        self.before_video(None)

    def before_video(self, system: str | None) -> list[int]:
        """Ids of everything before the first frame."""
        turns = [{"role": "system", "content": [{"type": "text", "text": self._plain(system)}]}] if system else []
        ids = self._ids(self._render([*turns, _user("x", video=True)]))
        return ids[: self._at(ids)]

    def after_video(self, question: str) -> list[int]:
        """Ids from the end of the video to the start of the answer."""
        ids = self._ids(self._render([_user(self._plain(question), video=True)]))
        return ids[self._at(ids) + 1 :]

    def next_turn(self, question: str) -> list[int]:
        """Ids from the end of an answer through another question, without a video, to the start of its answer."""
        return self._after_answer(_user(self._plain(question), video=False))

    def next_video(self) -> list[int]:
        """Ids from the end of an answer to the next frame."""
        ids = self._after_answer(_user("x", video=True))
        return ids[: self._at(ids)]

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text, special tokens recognised."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _after_answer(self, turn: dict[str, Any]) -> list[int]:
        """Ids of a further turn, from the last character of the answer on.

        They are cut out of the whole conversation's ids, since many tokenizers treat the start of a text in a way of their own.
        Where a token reaches across the cut, and where a tokenizer does not tell its tokens' places, the rest is tokenized alone.
        """
        rendered = self._render([_user("x", video=True), _assistant(_SAID), turn])
        if _SAID not in rendered:
            raise ModelError("the chat template does not show the answers of earlier turns")
        cut = rendered.index(_SAID) + len(_SAID)
        if not getattr(self._tokenizer, "is_fast", False):
            return self.text_ids(rendered[cut:])
        whole = self._tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        first = next((at for at, (_, end) in enumerate(whole["offset_mapping"]) if end > cut), len(whole["input_ids"]))
        if whole["offset_mapping"][first : first + 1] and whole["offset_mapping"][first][0] < cut:
            return self.text_ids(rendered[cut:])
        return list(whole["input_ids"][first:])

    def _plain(self, text: str) -> str:
        if self._video_text in text:
            raise MillpondError(f"a question or system message must not contain {self._video_text!r}")
        return text

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

    def _ids(self, rendered: str) -> list[int]:
        # A template may write the beginning-of-sequence token itself; it must not stand there twice.
        bos = getattr(self._tokenizer, "bos_token", None)
        special = not (bos and rendered.startswith(bos))
        ids = list(self._tokenizer(rendered, add_special_tokens=special)["input_ids"])
        eos = getattr(self._tokenizer, "eos_token_id", None)
        if special and eos is not None and ids[-1:] == [eos] and self.text_ids(rendered)[-1:] != [eos]:
            ids.pop()  # some tokenizers end every text
        return ids


def _user(text: str, *, video: bool) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "video"}] if video else []
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
