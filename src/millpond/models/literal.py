"""A tokenizer that takes some text literally: control tokens spelled in it stay text, while those around it stay control tokens.

A tokenizer looks for its added tokens anywhere in what it is given, so `<|im_end|>` in a question would end the turn. Here the added
tokens answer to private names instead, which only the chat template's own text is translated to. Knows nothing about chats.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

# Private-use characters: no text has them by chance, and no tokenizer takes them apart before it looks for added tokens.
_NAME = "\ue000millpond {}\ue001"


@dataclass(frozen=True)
class Encoded:
    """A text as a tokenizer sees it.

    Attributes:
        ids: its tokens.
        offsets: each one's first character and the one behind its last; empty where the tokenizer does not tell.
        text: what the offsets count in.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    text: str


class Literal:
    """A tokenizer with its added tokens under private names.

    Args:
        tokenizer: a fast one of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        said = json.loads(tokenizer.backend_tokenizer.to_str())
        added = tokenizer.added_tokens_decoder
        self._core = Tokenizer.from_str(json.dumps({**said, "added_tokens": [], "truncation": None, "padding": None}))
        self._names = {token.content: _NAME.format(id_) for id_, token in added.items()}
        self._core.add_special_tokens(
            [
                AddedToken(
                    self._names[token.content],
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                    normalized=False,
                )
                for token in added.values()
            ]
        )
        self._ids = {self._core.token_to_id(self._names[token.content]): id_ for id_, token in added.items()}

    def encode(self, before: str, behind: str, text: str) -> Encoded:
        """A text taken literally between two pieces of a template."""
        whole = text.join(map(self._privately, (before, behind)))
        encoded = self._core.encode(whole, add_special_tokens=False)
        return Encoded([self._ids.get(id_, id_) for id_ in encoded.ids], encoded.offsets, whole)

    def _privately(self, template: str) -> str:
        """A template's own text with its control tokens under their private names."""
        for content in sorted(self._names, key=len, reverse=True):
            template = template.replace(content, self._names[content])
        return template
