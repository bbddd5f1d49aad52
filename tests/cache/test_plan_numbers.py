"""The numbers of a few plans, and of every policy's scratch, held to the byte: a bound that grows takes memory from the stream, and one
that shrinks is only noticed by an allocation. Whoever changes a rule of the split changes this table, knowingly."""

import pytest
import torch

from millpond.cache.consumers import make_plan
from millpond.memory.geometry import Geometry
from millpond.policies.base import Shape
from millpond.policies.registry import available, read

GEOMETRY = Geometry(layers=4, kv_heads=2, head_dim=32, dtype=torch.float16, axes=3, kv_groups=3)
# 4 layers x 2 heads x (2 x 32 x 2 bytes of keys and values, 24 of metadata, 4 where attention is summed)
TOKEN, SUMMED = 8 * (128 + 24), 8 * (128 + 24 + 4)


@pytest.mark.parametrize(
    ("policy", "token", "slots", "sizes", "others"),
    [
        ("rekv", TOKEN, (9, 950, 64, 290, 1008), {"scratch": 323_376}, (4, 72, 0)),
        (
            "mikv:base=h2o:group=8",
            SUMMED,
            (9, 445, 64, 73, 0),
            {
                "quantized store": 1_307_136,
                "dequantization buffer": 605_952,
                "scratch": 418_584,
                "undo": (591 + 1776) * 32,
            },
            (4, 18, 1776),
        ),
        ("hermes", TOKEN, (9, 1700, 192, 271, 0), {"scratch": 381_264, "queries": 61_440, "undo": 61_440}, (4, 67, 0)),
        ("snapkv+cake", TOKEN, (9, 1708, 192, 272, 0), {"scratch": 444_340, "queries": 32 * 1536}, (4, 68, 0)),
        ("kvmerger", TOKEN, (9, 1713, 192, 273, 0), {"scratch": 436_134, "queries": 32 * 1536}, (4, 68, 0)),
    ],
)
def test_how_three_megabytes_are_split(
    policy: str, token: int, slots: tuple[int, ...], sizes: dict[str, int], others: tuple[int, int, int]
) -> None:
    plan = make_plan(
        3 << 20, GEOMETRY, read(policy), prompt_tokens=9, group_tokens=16, frames_per_group=2, proxy_tokens=40
    )
    of_slots = dict(zip(("prompt", "memory", "headroom", "turn", "retrieved frames"), slots, strict=True))
    for line in plan.lines:
        count = of_slots.get(line.name, 0)
        assert (line.slots, line.bytes) == (count, count * token or sizes.get(line.name, 0)), line.name
    assert (plan.block_groups, plan.chunk, plan.quantized_tokens) == others


SCRATCH = {
    "cake": (154_112, 55_840),
    "h2o": (58_000, 6_390),
    "hermes": (162_272, 84_760),
    "infinipot-v": (121_696, 47_684),
    "infinipot-v-released": (121_840, 139_720),
    "infinite-vggt": (82_400, 24_840),
    "keydiff": (82_400, 24_840),
    "kvmerger": (219_392, 59_112),
    "mikv": (121_696, 47_684),
    "random": (56_000, 6_120),
    "recent": (56_000, 6_120),
    "rekv": (56_000, 6_120),
    "snapkv": (148_112, 35_062),
    "streaming-vlm": (79_000, 8_190),
    "streammem": (215_392, 60_012),
    "uniform": (72_000, 7_560),
}


def test_the_scratch_of_every_policy() -> None:
    """Of a view of 2 heads, 1,000 tokens and 48 dimensions, and of one of 3 heads, 90 tokens and 128 dimensions."""
    large, small = Shape(2, 1000, 48, block=20, chunk=64), Shape(3, 90, 128, block=6, chunk=16)
    capped = [read(policy.name) for policy in available() if policy.capped]
    assert {policy.name: (policy.scratch(large), policy.scratch(small)) for policy in capped} == SCRATCH
    assert read("snapkv+cake").scratch(small) == 50_080, "the allocator's own pass is larger than the policy's"


def test_what_ignores_the_cap_begins_small() -> None:
    plan = make_plan(None, GEOMETRY, read("full"), prompt_tokens=9, group_tokens=16)
    assert (plan.slots, plan.turn_tokens) == (9 + 512 + 8 * 16, 81)
    asked = make_plan(None, GEOMETRY, read("full"), prompt_tokens=9, group_tokens=16, reserve_tokens=40)
    assert (asked.slots, asked.turn_tokens) == (9 + 40 + 8 * 16, 40)
