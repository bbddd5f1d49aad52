"""A pond for `model.generate(..., cache=PondCache(...))`: the cap without a session.

Before transformers 5.24 the argument is called `past_key_values`.

Every token is plain text to the policy. For video, positions and questions beside a stream, use `millpond.Session`.
"""

from __future__ import annotations

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
from millpond.policies.base import TEXT, Policy
from millpond.policies.composition import POND_CACHE, check


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
        self._seen = 0
        self._newest = 0  # tokens of the latest forward, which are stored as they came until the next one

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

    def _compact_if_full(self) -> None:
        """Compact between forwards, when every layer has the same length and less than `headroom` is free."""
        if self.policy.capped and self.free < self.headroom and self.layers[-1].length == self.length:
            self._newest = 0
            self.ensure_capacity(self.headroom)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that have gone by; `length` and `memory_tokens` count those that are stored."""
        return self._seen

    @property
    def is_croppable(self) -> bool:
        """Assisted and prompt-lookup decoding take back what a forward proposed in vain."""
        return True

    def activate_past_recording(self) -> None:
        """Nothing to do: the tokens of the latest forward can always be taken back."""

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the latest `-tokens_to_remove` tokens, as transformers asks for it: a number that is not positive.

        Raises:
            ModelError: they are not all of the latest forward; those before it may have been compacted.
        """
        count = -tokens_to_remove
        if not 0 <= count <= self._newest:
            latest = f"the {self._newest} tokens of the latest forward (crop(-n))"
            raise ModelError(f"a pond cache can take back {latest}, not crop({tokens_to_remove})")
        length = self.length - count
        pinned = max(0, min(self.length, self.plan.prompt_tokens) - length)  # those were never counted as the stream's
        if count > pinned:
            self.recent = self.recent.without_text(count - pinned)
        self.truncate(length)
        self._seen -= count
        self._newest -= count

    def get_query_offset(self, layer_idx: int = 0) -> int:
        self._compact_if_full()
        return self.quantized_tokens + self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        self._compact_if_full()
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def reset(self) -> None:
        """Forget everything; the storage stays."""
        self.finish()
        self.storage.clear()
        self._seen = self._newest = 0
        self.recent = RecentWindow()
