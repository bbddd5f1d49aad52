"""What a compaction sees of the pond, and all that it sees: where the tokens lie, what chooses among them, and the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from millpond.cache.host import HostCache
from millpond.cache.plan import Plan
from millpond.cache.proxy_queries import ProxyQueries
from millpond.cache.recent import Protected, RecentWindow
from millpond.cache.storage.base import Storage
from millpond.memory.ledger import Ledger
from millpond.policies.base import Policy, View
from millpond.positions import Rope


@dataclass(frozen=True, eq=False)
class CompactionState:
    """The state in front of one pass.

    Attributes:
        storage, plan, policy, ledger, recent, queries, host, rope: as in `millpond.cache.pond.Pond`.
        count_pass: sets the pond's own counts after the pass, given what is recent then; can be repeated.
    """

    storage: Storage
    plan: Plan
    policy: Policy
    ledger: Ledger
    recent: RecentWindow
    queries: ProxyQueries
    host: HostCache | None
    rope: Rope | None
    count_pass: Callable[[RecentWindow], None]

    @property
    def tokens(self) -> int:
        """Tokens in full behind the prompt, on average over the layers."""
        return max(0, self.storage.mean_length - self.plan.prompt_tokens)

    def protect(self, slots: int) -> Protected:
        """What must be among `slots` tokens that are kept."""
        return self.recent.protect(self.tokens, slots, self.policy.recent)

    def view(self, index: int, protected: Protected) -> View:
        """One layer's memory as the policy is shown it."""
        layer, start = self.storage.layers[index], self.plan.prompt_tokens
        live = (tensor.narrow(1, start, layer.length - start) for tensor in layer.tensors())
        keys, values, time_us, grid_position, positions, *attention = live
        return View(
            keys,
            values,
            time_us,
            grid_position,
            protected.mask(time_us, grid_position),
            index,
            len(self.storage.layers),
            self.recent.group_tokens or 1,
            self.plan.chunk,
            queries=self.queries.layer(index) if self.policy.needs.proxy else None,
            prompt_keys=layer.keys[0, :, :start] if self.policy.needs.proxy else None,
            accumulated_attention=attention[0] if attention else None,
            positions=positions if self.policy.needs.positions else None,
            rope=self.rope if self.policy.needs.positions else None,
        )
