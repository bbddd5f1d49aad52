"""A pond for `model.generate(..., past_key_values=PondCache(...))`: the cap without a session.

Knows no frames: every token is plain text to the policy, unless the caller announces more. For video, positions and
questions beside a stream, use `millpond.Session`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from millpond import policies
from millpond.budget import Budget
from millpond.cache.pond import Pond
from millpond.errors import BudgetError, PolicyError
from millpond.geometry import Geometry
from millpond.plan import make_plan
from millpond.policies.base import TEXT, Policy

__all__ = ["PondCache"]


class PondCache(Pond):
    """A capped cache for one sequence, to hand to transformers.

    A forward may bring as many tokens as there are free slots: at first all of them, later at least `room`. When the cache
    has filled up, it compacts at the first look at it after a forward, which is before the next one sizes its mask.

    Args:
        model: a loaded transformers model; its cache's shape, dtype and device are read off it.
        budget: bytes; None only with the policy "full".
        policy: a name or a `Policy`.
        pinned: first tokens that always survive (attention sinks, a system prompt).

    Raises:
        BudgetError: too small; names the least that works.
        ModelError: layers without plain keys and values.
        PolicyError: the policy looks at queries, which a cache is never given, or recalls frames.
    """

    def __init__(
        self, model: Any, budget: str | int | None, policy: str | Policy = "infinipot-v", *, pinned: int = 4
    ) -> None:
        chosen = policies.read(policy) if isinstance(policy, str) else policy
        if chosen.proxy or chosen.sums:
            raise PolicyError(f"the policy {chosen.name!r} looks at the model's queries, which only a Session shows it")
        if chosen.recalls:
            raise PolicyError(f"the policy {chosen.name!r} recalls frames from host memory, which only a Session does")
        if chosen.layer_share > 1:
            raise PolicyError(f"the policy {chosen.name!r} has layer budgets, which need the masks of a Session")
        geometry = Geometry.from_config(model.config, model.dtype)
        plan = make_plan(
            None if budget is None else int(Budget(budget)),
            geometry,
            chosen,
            prompt_tokens=pinned,
            reserve_tokens=0,
            what="this model",
        )
        super().__init__(geometry, plan, chosen, model.device)
        self._seen = 0

    @property
    def room(self) -> int:
        """The largest block that always fits (use it as `prefill_chunk_size`)."""
        return self.plan.room_tokens

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
                    f"of at most {self.room} tokens (generate has prefill_chunk_size) or raise the budget"
                )
            self.resize(replace(self.plan, slots=2 * (self.length + count)))
        index = torch.arange(self._seen, self._seen + count)
        place = torch.full((count, 2), TEXT, dtype=torch.int16)
        self.announce(index, place, index.expand(self.geometry.axes, -1))
        behind = max(0, self.length + count - max(self.length, self.plan.prompt_tokens))
        self.commit(index[count - behind :], place[count - behind :])
        self._seen += count

    def _settle(self) -> None:
        """Compact between forwards, when every layer has the same length and less than `room` is free."""
        if self.policy.capped and self.free < self.room and self.layers[-1].length == self.length:
            self.admit(self.room)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        self._settle()
        length: int = super().get_seq_length(layer_idx)
        return length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        self._settle()
        return self.packed_tokens + self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        self._settle()
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def reset(self) -> None:
        """Forget everything; the storage stays."""
        for layer in self.layers:
            layer.reset()
        self._seen, self._text = 0, None
        self._recent.clear()
