"""Every method's parameters by default: what is published, and the limits beyond which one is refused."""

from dataclasses import fields

import pytest

import millpond.policies
from millpond import PolicyError
from millpond.policies import registry
from millpond.policies.allocators.base import apportion
from millpond.policies.registry import ALLOCATORS, available, read
from tests.cache.text_model import Newest
from tests.policies.views import grid_view

PUBLISHED = {
    "cake": {"window": 32, "gamma": 200.0},
    "full": {},
    "h2o": {"recent_share": 0.5},
    "hermes": {"shallow": 0.1, "deep": 0.3, "recency": 0.75, "fade": 0.6},
    "infinipot-v": {
        "alpha": 0.5,
        "tar_first": 1.5,
        "recent_share": 0.25,
        "pooling": "adaptive",
        "thresholds": (0.2, 0.3, 0.4),
    },
    "infinipot-v-released": {
        "tar_ratio": 0.5,
        "query_ratio": 0.25,
        "adaptive_pooling": False,
        "rows": 14,
        "release": "2026-01",
    },
    "infinite-vggt": {"temperature": 0.5},
    "keydiff": {},
    "kvmerger": {"window": 32, "heavy": 0.25, "threshold": 0.75},
    "mikv": {"bits": 4, "full_share": 0.2, "base": "infinipot-v", "group": 32},
    "random": {"seed": 0},
    "recent": {"sink": 4},
    "rekv": {"frames": 64},
    "snapkv": {"window": 32, "kernel": 5, "pooling": "avg"},
    "streaming-vlm": {"text_sink": 512, "text_window": 512, "vision_seconds": 16.0},
    "streammem": {"prototypes": 0.5},
    "uniform": {},
}


def test_the_defaults_are_those_that_the_docstrings_name() -> None:
    assert {kind.name: {field.name: field.default for field in fields(kind)} for kind in available()} == PUBLISHED
    allocators = {kind.name: {field.name: field.default for field in fields(kind)} for kind in ALLOCATORS.available()}
    assert allocators == {"cake": {"window": 32, "tau1": 1.0, "tau2": 1.0}, "diversity": {"temperature": 0.5}}


@pytest.mark.parametrize(
    ("policy", "good", "bad"),
    [
        ("cake", ["window=1", "gamma=0"], ["window=0", "gamma=-1", "gamma=inf"]),
        ("h2o", ["recent_share=0", "recent_share=1"], ["recent_share=-0.1", "recent_share=1.1"]),
        ("hermes", ["shallow=0.7", "fade=0.75", "deep=0"], ["shallow=0.8", "fade=0.8", "recency=1.1", "deep=-0.1"]),
        ("infinipot-v-released", ["tar_ratio=1", "rows=1"], ["query_ratio=0", "tar_ratio=1.1", "release=2024-01"]),
        ("infinite-vggt", ["temperature=0.1"], ["temperature=0"]),
        ("kvmerger", ["window=1", "heavy=1", "threshold=-1"], ["window=0", "heavy=1.1", "threshold=1.5"]),
        ("mikv", ["full_share=0.9"], ["full_share=1", "full_share=0", "bits=5"]),
        ("random", ["seed=-3"], ["seed=0.5"]),
        ("recent", ["sink=0"], ["sink=-1"]),
        ("rekv", ["frames=1"], ["frames=0"]),
        ("snapkv", ["window=1", "kernel=1", "pooling=max"], ["window=0", "kernel=4", "kernel=0", "pooling=sum"]),
        ("streaming-vlm", ["text_sink=0", "text_window=0"], ["text_sink=-1", "text_window=-1", "vision_seconds=0"]),
        ("streammem", ["prototypes=0", "prototypes=1"], ["prototypes=-0.1", "prototypes=1.1"]),
    ],
)
def test_parameters_at_their_limits_and_beyond(policy: str, good: list[str], bad: list[str]) -> None:
    for parameter in good:
        read(f"{policy}:{parameter}")
    for parameter in bad:
        with pytest.raises(PolicyError):
            read(f"{policy}:{parameter}")
    for allocator in ("cake:window=1", "cake:tau1=0", "cake:tau2=-1", "diversity:temperature=0"):
        with pytest.raises(PolicyError):
            read(f"snapkv+{allocator}")


def test_layers_share_evenly_unless_a_policy_says_otherwise() -> None:
    assert Newest().layer_weights(iter([grid_view(2, 1, 1)] * 3)) == [1.0, 1.0, 1.0]
    assert (Newest().minimum_memory(7), Newest().recent(9)) == (7, 1)


def test_shares_are_whole_numbers_within_bounds_with_an_exact_sum() -> None:
    assert apportion(10, [1, 2], [1, 1], [9, 9]) == [3, 7]  # 3.33 and 6.67
    assert apportion(10, [1, 1, 2], [1, 1, 1], [9, 9, 4]) == [3, 3, 4]
    assert apportion(10, [0, float("nan"), -1], [1, 1, 1], [9, 9, 9]) == [4, 3, 3]
    assert apportion(10, [5, 0], [2, 3], [9, 9]) == [7, 3]
    assert apportion(99, [1, 1], [1, 1], [4, 5]) == [4, 5]
    assert apportion(2, [1, 1], [1, 1], [4, 5]) == [1, 1]
    with pytest.raises(PolicyError, match="2 layer budgets for 3 layers"):
        apportion(9, [1, 1], [1, 1, 1], [3, 3, 3])
    with pytest.raises(PolicyError, match="7 tokens must stay, and 6 fit"):
        apportion(6, [1, 1], [3, 4], [4, 5])


def test_the_room_s_names_are_those_of_its_modules() -> None:
    assert millpond.policies.get is registry.get
    assert {"get", "Policy", "read"} <= set(dir(millpond.policies))
    assert millpond.policies.Policy.__module__ == "millpond.policies.base"
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        millpond.policies.nonesuch  # noqa: B018
