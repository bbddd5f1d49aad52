"""A pond for `model.generate(..., cache=PondCache(...))`: the cap without a session.

Before transformers 5.24 the argument is called `past_key_values`.

Every token is plain text to the policy. Where it looks at the model's queries, or gives layers different budgets, the cache hooks into the
model's forwards on it. For video, positions and questions beside a stream, use `millpond.Session`.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from millpond import policies
from millpond.cache.consumers import make_plan
from millpond.cache.pond import Pond
from millpond.cache.recent import RecentWindow
from millpond.errors import BudgetError, MillpondError, ModelError, PolicyError
from millpond.memory.available import check_memory
from millpond.memory.budget import Budget
from millpond.memory.geometry import Geometry
from millpond.models.decoder import rotary_frequencies
from millpond.models.query_recorder import QueryRecorder
from millpond.models.transformers_insides import decoder_of, layers_of_different_lengths, rotated
from millpond.policies.base import TEXT, Policy
from millpond.policies.composition import POND_CACHE, check
from millpond.positions import Rope


class PondCache(Pond):
    """A capped cache for one sequence, to hand to transformers.

    A forward may bring as many tokens as there are free slots: at first all of them, later at least `headroom`. When the cache
    has filled up, it compacts when the next forward sizes its mask.

    `get_seq_length` counts every token that has gone by, forgotten ones too: from it `generate` tells which tokens are new, and a
    model where they stand. Masks are sized by what is stored. Padding is not supported: one sequence needs none.

    Args:
        model: a loaded transformers model; its cache's shape, dtype and device are read off it.
        budget: bytes; None only with the policy "full".
        policy: a name or a `Policy`.
        pinned: first tokens that always survive (attention sinks, a system prompt).

    Raises:
        BudgetError: too small; names the minimum that works. Or more than the memory that there is.
        ModelError: no model; layers without plain keys and values, or that see a window only.
        PolicyError: no policy, or one that needs what only a session has; see `millpond.policies.composition`.
    """

    def __init__(
        self, model: Any, budget: str | int | None, policy: str | Policy = policies.DEFAULT_POLICY, *, pinned: int = 4
    ) -> None:
        chosen = policies.read(policy) if isinstance(policy, str) else policy
        if not isinstance(chosen, Policy):
            raise PolicyError(f"policy must be a name or a Policy, not {policy!r}")
        check(chosen, POND_CACHE)
        if not hasattr(model, "config"):
            raise ModelError(f"a PondCache is made for a loaded transformers model, not for {model!r}")
        if not isinstance(pinned, int) or pinned < 0:
            raise MillpondError(f"pinned must be a whole number, at least 0, not {pinned!r}")
        geometry = Geometry.from_config(model.config, model.dtype)
        size = None if budget is None else int(Budget(budget))
        plan = make_plan(size, geometry, chosen, prompt_tokens=pinned, reserve_tokens=0)
        check_memory(plan.total_bytes, model.device)
        with torch.inference_mode(False):  # else the storage could never be written to outside of it
            super().__init__(geometry, plan, chosen, model.device)
        self._model, self._given = model, (budget, chosen, pinned)
        self._seen = 0
        self._newest = 0  # tokens of the latest forward, which are stored as they came until the next one
        self._looks = chosen.needs.proxy is not None or chosen.needs.accumulated_attention
        if self._looks or chosen.needs.positions or chosen.needs.layer_share > 1:
            decoder = decoder_of(model)
            if self._looks or chosen.needs.positions:
                self.rope = _rope(decoder, model.config.get_text_config(), geometry)
            _Forwards(decoder, self, queries=self._looks, layer_budgets=chosen.needs.layer_share > 1)

    @property
    def headroom(self) -> int:
        """The largest block that always fits (use it as `prefill_chunk_size`)."""
        return self.plan.headroom_tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [1, H, n, D] keys and values of one layer; the first layer makes the block known to all.

        Raises:
            BudgetError: the block is larger than the free slots.
        """
        if layer_idx == 0:
            self._arrive(key_states.shape[2])
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return updated

    def _arrive(self, count: int) -> None:
        if count > self.free:
            if self.policy.capped:
                raise BudgetError(
                    f"a block of {count} tokens does not fit into the {self.free} free slots of the cache: prefill in blocks "
                    f"of at most {self.headroom} tokens (generate has prefill_chunk_size) or raise the budget"
                )
            self.resize(self.plan.with_slots(2 * (self.length + count)))
        index = torch.arange(self._seen, self._seen + count)
        grid_position = torch.full((count, 2), TEXT, dtype=torch.int16)
        self.write_metadata(index, grid_position, index.expand(self.geometry.axes, -1))
        behind = max(0, self.length + count - max(self.length, self.plan.prompt_tokens))
        self.commit(index[count - behind :], grid_position[count - behind :])
        self._seen += count
        self._newest = count

    def see(self, layer: int, queries: Tensor) -> None:
        """Take in the queries [n, query heads, D] of the block that one layer has just attended with, before their rotation."""
        at = torch.arange(self._seen - len(queries), self._seen).expand(self.geometry.axes, -1)
        assert self.rope is not None
        if self.policy.needs.proxy is not None:
            self.queries.note(layer, queries, at, self.rope)
        if self.policy.needs.accumulated_attention:
            self.accumulate_attention(layer, queries, at)

    def _compact_if_full(self) -> None:
        """Compact between forwards, when no layer has taken in more than another and less than `headroom` is free."""
        between = self.layers[-1].length - self.storage.ahead[-1] == self.length
        if self.policy.capped and self.free < self.headroom and between:
            self._newest = 0
            self.ensure_capacity(self.headroom)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that have gone by; `length` and `memory_tokens` count those that are stored."""
        return self._seen

    @property
    def is_croppable(self) -> bool:
        """Whether assisted and prompt-lookup decoding can take back what a forward proposed in vain: not the attention that it paid."""
        return not self.policy.needs.accumulated_attention

    def activate_past_recording(self) -> None:
        """Nothing to do: the tokens of the latest forward can always be taken back."""

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the latest `-tokens_to_remove` tokens, as transformers asks for it: a number that is not positive.

        Raises:
            ModelError: they are not all of the latest forward; those before it may have been compacted. Or they have paid attention that
                is accumulated.
        """
        count = -tokens_to_remove
        if count and not self.is_croppable:
            raise ModelError(f"the policy {self.policy.name!r} sums up attention, which a pond cache cannot take back")
        if not 0 <= count <= self._newest:
            latest = f"the {self._newest} tokens of the latest forward (crop(-n))"
            raise ModelError(f"a pond cache can take back {latest}, not crop({tokens_to_remove})")
        length = self.length - count
        pinned = max(0, min(self.length, self.plan.prompt_tokens) - length)  # those were never counted as the stream's
        if count > pinned:
            self.recent = self.recent.without_text(count - pinned)
        self.truncate(length)
        self.queries.forget(count)
        self._seen -= count
        self._newest -= count

    def get_query_offset(self, layer_idx: int = 0) -> int:
        self._compact_if_full()
        return self.quantized_tokens + self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        self._compact_if_full()
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def fork(self) -> PondCache:
        """A second cache on a copy of the memory, under a cap of its own: for several questions behind one long prompt."""
        budget, policy, pinned = self._given
        other = PondCache(self._model, budget, policy, pinned=pinned)
        state = self.state()
        with torch.inference_mode(False), torch.no_grad():
            if not self.policy.capped:
                other.resize(state.plan)
            other.restore(state)
        other._seen, other._newest = self._seen, self._newest
        return other

    def reset(self) -> None:
        """Forget everything; the storage stays."""
        self.finish()
        self.storage.clear()
        self.queries.forget(self._seen)
        self._seen = self._newest = 0
        self.recent = RecentWindow()


class _Forwards:
    """Hooks around a decoder's forwards on one cache; gone when the cache is.

    Args:
        queries: whether the cache sees each layer's. layer_budgets: whether its layers may hold different numbers of tokens.
    """

    def __init__(self, decoder: Any, cache: PondCache, *, queries: bool, layer_budgets: bool) -> None:
        self._layer_budgets = layer_budgets
        self._cache = weakref.ref(cache)  # the hooks must not keep the cache alive
        self._running = ExitStack()
        try:
            self._recorder = QueryRecorder(decoder, cache.geometry.head_dim) if queries else None
        except AttributeError as error:
            raise ModelError(f"no queries can be seen in {type(decoder).__name__}: {error}") from None
        before = decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        after = decoder.register_forward_hook(self._end, always_call=True)
        weakref.finalize(cache, _remove, [before, after])

    def _begin(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache = self._cache()
        if cache is None or all(kwargs.get(name) is not cache for name in ("cache", "past_key_values")):
            return
        if self._layer_budgets:
            self._running.enter_context(layers_of_different_lengths(decoder))
        if self._recorder is not None:
            self._running.enter_context(self._recorder.showing(cache.see))

    def _end(self, decoder: Any, args: Any, output: Any) -> None:
        self._running.pop_all().close()


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _rope(decoder: Any, text: Any, geometry: Geometry) -> Rope:
    """The rotary embedding of the model's keys.

    Raises:
        ModelError: it is of a kind that cannot be followed.
    """
    probe = torch.linspace(-1, 1, geometry.head_dim).view(1, 1, 1, -1)
    expected = rotated(decoder, probe.to(geometry.dtype).to(decoder.device), 7)
    if expected is not None:
        frequencies = rotary_frequencies(decoder, text)
        rope = Rope(frequencies, torch.zeros(len(frequencies), dtype=torch.long), int(text.max_position_embeddings))
        rope.rotate_(probe[0, 0], torch.tensor([[7]]))
        if torch.allclose(expected.float().cpu(), probe, atol=0.05 if geometry.dtype.itemsize < 4 else 1e-4):
            return rope
    raise ModelError(
        f"the rotary embedding of {type(decoder).__name__} is none that a PondCache can follow for this policy"
    )
