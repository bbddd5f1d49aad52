"""Random arguments for every operation: dtypes, layouts and sizes with their odd ends. An operation without an entry in `CASES` fails
`tests/ops/test_parity.py`."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from millpond.memory.resumable import Progress
from millpond.ops.dequantization import code_word
from millpond.ops.ranking import best_and_protected
from millpond.ops.width_choice import Estimators, estimate, rms_norm
from tests.policies.views import grid_view, joined, thinned, with_text

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Case:
    """One call.

    Attributes:
        arguments, named: of it.
        close: rtol and atol between kernel and reference; nothing where they give the same bits.
        seen: what of the result is compared.
    """

    arguments: tuple[Any, ...]
    named: dict[str, Any] = field(default_factory=dict)
    close: dict[str, float] = field(default_factory=dict)
    seen: Callable[[Any], Any] = lambda result: result


class Draw:
    """One seed's choices."""

    def __init__(self, seed: int) -> None:
        self.any = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.torch)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.torch)

    def cut(self, tensor: Tensor, axis: int = -2) -> Tensor:
        """The same numbers; sometimes as a part of larger storage, sometimes with rows apart."""
        kind = self.any.choice(("whole", "cut", "cut", "apart"))
        if kind == "whole":
            return tensor
        axis = axis if kind == "cut" else -1
        shape = list(tensor.shape)
        shape[axis] += 5
        storage = torch.zeros(shape, dtype=tensor.dtype)
        part = storage.narrow(axis, 2, tensor.shape[axis])
        part.copy_(tensor)
        return part

    def keep(self, heads: int, tokens: int, slots: int) -> Tensor:
        """int64 [H, S], ascending."""
        rows = [sorted(self.any.sample(range(tokens), slots)) for _ in range(heads)]
        return torch.tensor(rows, dtype=torch.int64).view(heads, slots)


def best(draw: Draw) -> Case:
    heads, tokens = draw.any.randint(1, 3), draw.any.choice((1, 2, 7, 40, 513, 900))
    scores = draw.randn(heads, tokens)
    if draw.any.random() < 0.5:  # ties
        scores = scores.round()
    scores[draw.randn(heads, tokens) > 1.5] = torch.inf
    scores[draw.randn(heads, tokens) > 1.5] = -torch.inf
    scores[draw.randn(heads, tokens) > 1.5] = -0.0
    return Case((draw.cut(scores), draw.any.randint(1, tokens)))


def check_selection(draw: Draw) -> Case:
    heads, tokens = draw.any.randint(1, 3), draw.any.randint(2, 30)
    keep = draw.keep(heads, tokens, draw.any.randint(1, tokens))
    protected = torch.zeros(heads, tokens, dtype=torch.bool).scatter_(1, keep[:, : draw.any.randint(0, 3)], True)
    fault = draw.any.choice(("none", "order", "below", "above", "twice", "missing"))
    if fault == "order":
        keep[-1] = keep[-1].flip(0)
    elif fault in ("below", "above"):
        keep[0, -1] = -1 if fault == "below" else tokens
    elif fault == "twice":
        keep[-1, -1] = keep[-1, -2:][0]
    elif fault == "missing":
        protected[-1] = True
    return Case((draw.cut(keep), protected))


def move_rows(draw: Draw) -> Case:
    heads, tokens = draw.any.randint(1, 3), draw.any.randint(1, 40)
    width = draw.any.choice((1, 7, 16))
    tensors = [
        draw.cut(draw.randn(heads, tokens, width).to(draw.any.choice(FLOATS)), 1),
        draw.whole(0, 10**15, heads, tokens + 3)[:, :tokens],
        draw.whole(-2, 99, heads, tokens, 2).to(torch.int16),
        draw.whole(0, 255, heads, tokens, 3, width).to(torch.uint8),
    ]
    keep = draw.keep(heads, tokens, draw.any.randint(0, tokens))
    return Case((keep, tensors, draw.any.randint(1, 12), Progress()))


def rerotate(draw: Draw) -> Case:
    shape = draw.any.choice(((), (3,), (2, 2), (1, 3)))
    width, half = draw.any.choice(((2, 1), (14, 7), (64, 32), (128, 64), (80, 20)))
    tokens, dtype = draw.any.choice((1, 5, 23)), draw.any.choice(FLOATS)
    keys = draw.randn(*shape, tokens, width).to(dtype)
    keys[..., -1, 0] = torch.nan
    delta = draw.whole(-30_000, 30_000, 3, tokens).T  # by column
    delta[1 : tokens // 2] = delta[0].clone()
    if draw.any.random() < 0.5:  # tokens that move alike along one axis only
        delta[:, 2] = 7
    if tokens > 1:
        delta[tokens // 2] = 0
    if draw.any.random() < 0.3:
        delta = draw.whole(-30, 30, 1, 3).expand(tokens, 3)
    axis, inv_freq = draw.whole(0, 3, half), 1 / 10_000 ** (torch.arange(half) / half)
    chunk, progress = draw.any.choice((None, 1, 10, 50)), draw.any.choice((None, Progress()))
    # One rounding of a narrower number may fall the other way.
    close = (
        {"rtol": 2**-7 if dtype == torch.bfloat16 else 2**-10, "atol": 1e-6}
        if dtype != torch.float32
        else {"atol": 1e-6}
    )
    return Case((draw.cut(keys), delta, axis, inv_freq, chunk, progress), close={"rtol": 1e-5, **close})


def distinctiveness(draw: Draw) -> Case:
    tokens, width = draw.any.choice((1, 9, 60)), draw.any.choice((1, 7, 16, 31, 64, 130))
    keys = draw.randn(tokens, width).to(draw.any.choice(FLOATS))
    keys[-1] = 0
    return Case(
        (draw.cut(keys), draw.any.choice((1, 10, 100)), torch.full((tokens,), torch.nan)),
        close={"rtol": 1e-5, "atol": 1e-6},
    )


def owners(draw: Draw, tokens: int) -> Tensor:
    """int64 [n]: runs of tokens that go into one of them, and some that go nowhere."""
    owner = torch.full((tokens,), -1)
    first = 0
    while first < tokens:
        last = min(tokens, first + draw.any.randint(1, 6))
        owner[first:last] = draw.any.randrange(first, last)
        first = last
    owner[draw.randn(tokens) > 1] = -1
    return owner


def distances(draw: Draw) -> Case:
    tokens, width = draw.any.choice((1, 9, 60)), draw.any.choice((1, 7, 16, 31, 64))
    keys = draw.randn(tokens, width).to(draw.any.choice(FLOATS))
    owner = owners(draw, tokens)
    return Case((draw.cut(keys), owner, draw.any.choice((1, 7, 100))), close={"rtol": 1e-4, "atol": 1e-5})


def fold(draw: Draw) -> Case:
    tokens, width, dtype = draw.any.choice((1, 9, 60)), draw.any.choice((1, 7, 16)), draw.any.choice(FLOATS)
    keys, values = (draw.randn(tokens, width).to(dtype) for _ in range(2))
    keys[tokens // 2, 0], values[-1, -1] = torch.nan, torch.inf
    weight = draw.randn(tokens).abs()
    weight[draw.randn(tokens) > 1] = draw.any.choice((0.0, -1.0, torch.nan, torch.inf))
    close = {"rtol": 1e-4 if dtype == torch.float32 else 2**-7, "atol": 1e-5}
    keys, values = draw.cut(keys), draw.cut(values)
    return Case((keys, values, owners(draw, tokens), weight, draw.any.choice((1, 7, 100)), Progress()), close=close)


def asked(draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, float]]:
    """Queries [g, w, D], prompt, keys, the last key of each of the w queries, and how close kernel and reference come."""
    tokens, width, scale = draw.any.choice((1, 17, 70)), draw.any.choice((1, 8, 15, 32)), draw.any.choice((0.01, 1, 30))
    dtype = draw.any.choice(FLOATS)
    prompt, keys = ((draw.randn(count, width) * scale).to(dtype) for count in (draw.any.choice((0, 5, 20)), tokens))
    count = draw.any.choice((1, 2, 9))
    queries = draw.randn(draw.any.randint(1, 3), count, width)
    close = {"rtol": 1e-3, "atol": 5e-5} if scale > 1 else {"rtol": 1e-4, "atol": 1e-6}
    return queries, draw.cut(prompt), draw.cut(keys), draw.whole(0, tokens, count), close


def add_attention(draw: Draw) -> Case:
    queries, prompt, keys, last, close = asked(draw)
    sums, chunk = torch.full((len(keys),), 2.0), draw.any.choice((1, 16, 100))
    return Case((queries[0], prompt, keys, sums, chunk, draw.any.choice((None, last))), close=close)


def attention_moments(draw: Draw) -> Case:
    queries, prompt, keys, last, close = asked(draw)
    mean, variance = torch.full((2, len(keys)), torch.nan)
    return Case((queries, prompt, keys, mean, variance, draw.any.choice((1, 16, 100)), last), close=close)


def attention_spread(draw: Draw) -> Case:
    queries, prompt, keys, last, _ = asked(draw)
    counted, chunk = draw.any.randint(0, len(keys)), draw.any.choice((1, 16, 100))
    return Case((queries, prompt, keys, counted, chunk, last), close={"rtol": 1e-3, "atol": 1e-4}, seen=torch.tensor)


def dequantize(draw: Draw) -> Case:
    bits, group = draw.any.choice((2, 3, 4, 8)), draw.any.choice((1, 5, 8, 32))
    width, groups, by_channel = draw.any.choice((1, 3, 13, 80, 128)), draw.any.randint(1, 4), draw.any.random() < 0.5
    values, size = code_word(bits)
    codes = draw.whole(0, 256, groups, group, -(-width // values) * size).to(torch.uint8)
    shape = (groups, 2, width) if by_channel else (groups, group, 2, -(-width // group))
    scales = (draw.randn(*shape) * 10.0 ** draw.whole(-7, 4, *shape)).half()
    out = draw.cut(torch.full((groups * group, width), torch.nan, dtype=draw.any.choice(FLOATS)))
    return Case((codes, scales, bits, by_channel, out, draw.any.choice((None, group, 3 * group + 1))))


def infinipot_v_selection(draw: Draw) -> Case:
    grid = draw.any.choice(((1, 1), (1, 9), (9, 1), (2, 3), (3, 4), (12, 12)))
    width, dtype = draw.any.choice((1, 7, 16, 17, 32, 80, 130)), draw.any.choice(FLOATS)
    made = {"width": width, "dtype": dtype, "seed": draw.any.randrange(1000)}
    view = grid_view(draw.any.randint(4, 9), *grid, recent=draw.any.randint(1, 3), **made)
    kind = draw.any.choice(("plain", "text", "sizes", "sparse", "odd"))
    if kind == "text" and grid != (1, 1):
        view = with_text(view)
    elif kind == "sizes":
        small = draw.any.randint(1, 3)
        view = joined(grid_view(4, 4, 5, **made), grid_view(small, 2, 3, recent=1, **made))
        view.protected[:] = view.time_us >= view.time_us[:, [-6 * small - 1]]  # frames of both sizes
    elif kind == "sparse":
        view = grid_view(20, 4, 5, recent=1, **made)
        view = thinned(view, best_and_protected(draw.randn(2, 400), view.protected, draw.any.choice((60, 200))), 1)
    keys, values = view.keys, view.values
    if kind == "odd":
        keys, values = (draw.cut(part.clone()) for part in (keys, values))
        number = draw.any.choice((torch.nan, torch.inf, 0.0))
        keys[0, : view.tokens // 3], values[0, view.tokens // 3 : view.tokens // 2] = number, number
    recent = int(view.protected[0].sum())
    slots = draw.any.randint(recent, view.tokens)
    # The cosines of single numbers are all 1 or -1, give or take a rounding.
    by_redundancy = recent if width == 1 else draw.any.randint(recent, slots)
    named = {
        "by_redundancy": by_redundancy,
        "slots": slots,
        "thresholds": draw.any.choice(((0.2, 0.3, 0.4), (0.4, 0.6, 0.8))),
    }
    named |= {"pooling": draw.any.choice((None, 1, 3, 5, 7)), "chunk": view.chunk, "span": draw.any.choice((3, 200))}
    return Case((keys, values, view.time_us, view.grid_position, view.protected), named)


def cluster_rows(draw: Draw) -> Case:
    rows, columns = draw.any.randint(1, 3), draw.any.choice((1, 5, 30, 75))
    weight, by = draw.randn(rows, columns), draw.randn(rows, columns).abs()
    if draw.any.random() < 0.5:
        weight[:, : columns // 2], by[0] = 0.5, 0  # many equal weights: empty clusters

    def seen(result: tuple[Tensor, dict[int, Tensor]]) -> list[Tensor]:
        labels, tables = result  # equal costs may label differently, with the same centroids
        return [*tables.values(), tables[high].gather(1, labels.long())]

    low, high = draw.any.choice(((3, 3), (3, 5), (3, 8)))
    return Case((weight, by, low, high), close={"rtol": 1e-3, "atol": 1e-4}, seen=seen)


def planes(draw: Draw) -> tuple[Tensor, Tensor, int, int]:
    """uint8 [N, 8, bytes], a table, its width and K."""
    rows, columns = draw.any.choice((1, 12, 33)), draw.any.choice((1, 7, 8, 31, 32, 33, 64, 101))
    width = draw.any.randint(3, 8)
    stored = draw.whole(0, 256, rows, draw.any.randint(width, 8), -(-columns // 8)).to(torch.uint8)
    return stored, draw.randn(rows, 1 << width).half().sort(1).values, width, columns


def nested_rows(draw: Draw) -> Case:
    stored, table, width, columns = planes(draw)
    first = draw.any.randrange(len(stored))
    last = draw.any.randint(first + 1, len(stored))
    return Case((stored, table, width, columns, first, last, draw.cut(torch.full((last - first, columns), torch.nan))))


def nested_product(draw: Draw) -> Case:
    stored, table, width, columns = planes(draw)
    x = draw.randn(
        draw.any.choice((1, 3, 4, 9)), columns
    )  # nine are a prompt, which the kernel leaves to the reference
    return Case((stored, table, width, columns, x), close={"rtol": 1e-4, "atol": 1e-4})


def exceed(draw: Draw) -> Case:
    rows, columns = draw.any.randint(1, 5), draw.any.choice((1, 8, 33, 70))
    x, scale = draw.randn(rows, columns), draw.any.choice((None, draw.randn(columns).abs() + 0.5))
    read = x if scale is None else rms_norm(x, scale, 1e-6)
    kinds = [draw.any.choice((0, 1, 3, 8, 11)) for _ in range(draw.any.randint(1, 4))]
    projections = [draw.randn(kind, columns).bfloat16() if kind else None for kind in kinds]
    lines = []
    for projection in projections:
        found = estimate(read, projection, 0.7, -0.2).sort().values.tolist()
        # Between two estimates, never at one: rounding must not decide.
        ordered = [found[0] - 1, *found, found[-1] + 1]
        low, high = max(pairwise(ordered), key=lambda pair: pair[1] - pair[0])
        lines.append((0.7, -0.2, draw.any.choice(((low + high) / 2, (low + high) / 2, torch.inf, -torch.inf))))
    return Case((x, Estimators(columns, lines, projections, scale, 1e-6)), seen=list)


def attend_step(draw: Draw) -> Case:
    streams, heads, group, width = (draw.any.randint(1, most) for most in (4, 3, 4, 40))
    dtype = draw.any.choice((torch.float32, torch.float32, torch.bfloat16))
    memories = []
    for _ in range(streams):
        length = draw.any.randint(0, 70)
        keys, values = (draw.randn(1, heads, length + draw.any.randint(1, 5), width) for _ in range(2))
        keys[:, :, length:] = float("nan")  # what lies there before is not read
        keys = keys if memories else draw.cut(keys)
        memories.append((keys.to(dtype), values.to(dtype), length))
    new = (draw.randn(streams, count, width).to(dtype) for count in (heads * group, heads, heads))
    return Case((*new, memories, width**-0.5), close={"rtol": 1e-5, "atol": 1e-6})


def few_rows_product(draw: Draw) -> Case:
    rows, columns = draw.any.choice(((1024, 1024), (1026, 1041), (64, 70)))  # of which the last is small
    shape = draw.any.choice(((1, draw.any.randint(2, 17)), (draw.any.randint(2, 17), 1), (3,)))
    weight, bias = draw.randn(rows, columns), draw.any.choice((None, draw.randn(rows)))
    return Case((draw.randn(*shape, columns), weight, bias), close={"rtol": 1e-4, "atol": 1e-3})


def write_metadata(draw: Draw) -> Case:
    heads, count, axes = draw.any.randint(1, 3), draw.any.choice((1, 4, 9)), draw.any.choice((1, 3))
    positions = draw.whole(-5, 10**6, axes, count).T  # by axis, as a model's
    if draw.any.random() < 0.3:
        positions = draw.whole(0, 99, count, 1).expand(count, axes)
    layers = []
    for _ in range(draw.any.randint(1, 3)):
        start, capacity = draw.any.randint(0, 5), count + draw.any.randint(5, 9)
        times, sums = draw.whole(0, 9, heads, capacity), draw.cut(draw.randn(heads, capacity), 0)
        grid_positions = draw.cut(draw.whole(0, 9, heads, capacity, 2).to(torch.int16), 1)
        rotary = draw.cut(draw.whole(0, 9, heads, capacity, axes).int(), 1)
        layers.append((start, times, grid_positions, rotary, draw.any.choice((None, sums))))
    grid_position = draw.whole(-2, 99, count, 2).to(torch.int16)
    return Case((draw.whole(0, 10**15, count), grid_position, positions, layers))


CASES: dict[str, Callable[[Draw], Case]] = {
    each.__name__: each
    for each in (
        add_attention,
        attend_step,
        attention_moments,
        attention_spread,
        best,
        check_selection,
        cluster_rows,
        dequantize,
        few_rows_product,
        distances,
        distinctiveness,
        exceed,
        fold,
        infinipot_v_selection,
        move_rows,
        nested_product,
        nested_rows,
        rerotate,
        write_metadata,
    )
}
