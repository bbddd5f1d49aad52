"""What all adapters share about the decoder: its cache's shape, its rotary embedding, how an answer ends, how it runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from millpond.errors import ModelError
from millpond.memory.geometry import Geometry
from millpond.models.base import Family, Tokens
from millpond.models.chat import Chat
from millpond.models.query_recorder import QueryRecorder, See
from millpond.models.transformers_insides import (
    cache_argument,
    causal_mask,
    layers_of_different_lengths,
    warn_above_last_tested,
)
from millpond.positions import Rope

# These change their frequencies with the length of the sequence, so a stored key could not be turned afterwards.
_LENGTH_DEPENDENT = ("dynamic", "longrope")
_ATTACHING = Lock()


class DecoderFamily(Family):
    """A family whose decoder is `model.model.language_model` and whose head is `model.lm_head`.

    The decoder runs in inference mode where the cache says that it copies what it is given (`copies`). Any other cache keeps the tensors
    themselves and may be written in place later, outside of these calls, which tensors made in inference mode would refuse: there,
    and everywhere else, `no_grad` has to do.

    Attributes:
        decoder: the language model without its head.
        chat: the prompt's layout.
        video_id: id of the video's placeholder token.

    Raises:
        ModelError: the rotary frequencies change with the length, a layer keeps no plain keys and values, or the chat template
            cannot be split around a video.
    """

    def __init__(self, model: Any, tokenizer: Any, image: dict[str, Any] | None = None) -> None:
        warn_above_last_tested()
        super().__init__(model, getattr(tokenizer, "tokenizer", tokenizer))
        text = model.config.get_text_config()
        kind = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
        if kind in _LENGTH_DEPENDENT:
            raise ModelError(f"rotary embeddings of type {kind!r} depend on the length and are not supported")
        self.decoder = model.model.language_model
        self._cache_argument = cache_argument(type(self.decoder))
        self.hidden = text.hidden_size
        inv_freq = self.decoder.rotary_emb.inv_freq.detach().to(torch.float32)
        axis = self._rope_axis(inv_freq.shape[0], text)
        self.rope = Rope(inv_freq.cpu(), axis, int(text.max_position_embeddings))
        self.geometry = Geometry.from_config(
            model.config, self.decoder.embed_tokens.weight.dtype, axes=int(axis.max()) + 1
        )
        video = getattr(model.config, "video_token_id", None)
        self.video_id = int(model.config.video_token_index if video is None else video)
        template = getattr(tokenizer, "chat_template", None)
        self.chat = Chat(self.tokenizer, self.video_id, template if isinstance(template, str) else None)
        known = self.decoder.embed_tokens.num_embeddings
        most = max([*self.chat.before_video(None), *self.chat.after_video("x")])
        if most >= known:
            raise ModelError(
                f"the tokenizer writes a chat with id {most}, the model knows {known} ids: it is another model's"
            )
        self.stop_ids = _stop_ids(model, self.tokenizer)
        self._recorder: QueryRecorder | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.decoder.embed_tokens.weight.device
        return device

    def _rope_axis(self, frequencies: int, text: Any) -> Tensor:
        """One axis for every frequency: 1-D RoPE."""
        return torch.zeros(frequencies, dtype=torch.long)

    def opening(self, system: str | None = None) -> list[int]:
        return self.chat.before_video(system)

    def question(self, text: str, *, after_video: bool) -> Tokens:
        return self.embed(self.chat.after_video(text) if after_video else self.chat.next_turn(text))

    def reopening(self) -> list[int]:
        return self.chat.next_video()

    @torch.no_grad()
    def embed(self, ids: list[int]) -> Tokens:
        return super().embed(ids)

    @torch.no_grad()
    def forward(self, tokens: Tokens, positions: Tensor, cache: Any) -> Tensor:
        # No 2-D mask, which could hide the newest keys: at batch 1 the cache's own sizes give the causal one.
        uneven, copies = getattr(cache, "uneven", False), getattr(cache, "copies", False)
        embeds = tokens.embeds[None]
        with (
            layers_of_different_lengths(self.decoder) if uneven else nullcontext(),
            torch.inference_mode() if copies else nullcontext(),
        ):
            mask = None if uneven or not copies else causal_mask(self.decoder, cache, embeds)
            hidden = self.decode(tokens, embeds, positions[:, None], cache, mask)[0]
        return hidden.clone() if copies else hidden  # the copy is an ordinary tensor

    def decode(self, tokens: Tokens, embeds: Tensor, positions: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
        """One call of the decoder over embeds [B, n, hidden] at positions [axes, B, n], which are those of `tokens`, into whatever stands in
        for a cache; returns its last hidden state [B, n, hidden]."""
        out = self.decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=(positions[0] if len(positions) == 1 else positions).to(self.device),
            use_cache=True,
            **{self._cache_argument: cache},
            **self._beside(tokens),
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _beside(self, tokens: Tokens) -> dict[str, Any]:
        """More arguments of the decoder, for families that have them."""
        return {}

    def showing_queries(self, see: See, *, before: bool = False) -> AbstractContextManager[None]:
        with _ATTACHING:  # sessions on one family may start at once
            if self._recorder is None:
                self._recorder = QueryRecorder(self.decoder, self.geometry.head_dim)
        return self._recorder.showing(see, before=before)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        scores: Tensor = self.model.lm_head(hidden)
        return scores


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    ends = getattr(model.generation_config, "eos_token_id", None) if model.generation_config else None
    found = set(ends if isinstance(ends, (list, tuple)) else [ends])
    found.add(getattr(tokenizer, "eos_token_id", None))
    return frozenset(int(token) for token in found if token is not None)
