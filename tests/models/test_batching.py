"""Several sessions in one forward: each gets what it would get alone, and what one of them raises is its own."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import linear

from millpond import BudgetError, MillpondError, PondCache, Session
from millpond.models import Family, Tokens, batching
from millpond.models.batching import Request, encode_batch, forward_batch, logits_batch
from millpond.models.query_recorder import See
from millpond.models.transformers_insides import LAST_TESTED
from millpond.precision.linear import NestedLinear
from millpond.precision.nested import nest
from millpond.stream.stored_tokens import dated
from tests.models.tiny import FAMILIES, tiny
from tests.session.frames import moving

QUESTION = "what is there now"
# One of every kind of storage and of what is done with queries: none, summed up, of a proxy, before the attention.
POLICIES = ("infinipot-v", "h2o", "streammem", "keydiff+diversity", "mikv:base=keydiff:bits=4", "rekv")


RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))


class Lockstep:
    """Runs a job a session, each in its own thread; their forwards are packed whenever all of them wait for one.

    Attributes:
        sizes: how many requests each batch had.
    """

    def __init__(self, family: Family) -> None:
        self.family, self.sizes = family, list[int]()
        self._asked: list[tuple[Request, list[Any]]] = []
        self._changed = threading.Condition()
        self._busy = 0

    def gateway(self) -> Family:
        """A family whose forwards are packed with others'."""
        gateway, looking = copy.copy(self.family), list[tuple[See, bool]]()

        @contextmanager
        def showing(see: See, *, before: bool = False) -> Iterator[None]:
            looking.append((see, before))
            yield
            looking.pop()

        def forward(tokens: Tokens, positions: Tensor, cache: Any) -> Tensor:
            answer: list[Any] = []
            request = Request(tokens, positions, cache, *(looking[-1] if looking else ()))
            with self._changed:
                self._asked.append((request, answer))
                self._busy -= 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: answer)
            if isinstance(answer[0], Exception):
                raise answer[0]
            hidden: Tensor = answer[0]
            return hidden

        gateway.showing_queries, gateway.forward = showing, forward  # type: ignore[method-assign]
        return gateway

    def run(self, *jobs: Callable[[], object]) -> list[Any]:
        """What each job returns, or raised."""
        results: list[Any] = [None] * len(jobs)

        def work(index: int) -> None:
            try:
                results[index] = jobs[index]()
            except Exception as error:
                results[index] = error
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

        self._busy = len(jobs)
        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
        for thread in threads:
            thread.start()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._busy)
                asked, self._asked = self._asked, []
                if not asked:
                    break
                self.sizes.append(len(asked))
                for (_, answer), result in zip(
                    asked, forward_batch(self.family, [request for request, _ in asked]), strict=True
                ):
                    answer.append(result)
                self._busy = len(asked)
                self._changed.notify_all()
        for thread in threads:
            thread.join()
        return results


def opened(family: Family, index: int, policy: str) -> Session:
    """A session with a budget of its own, for a stream of its own."""
    host = {"host_budget": "8MiB"} if policy == "rekv" else {}
    budget = (230 + 20 * index) * family.geometry.bytes_per_token + 150_000
    return Session(family, budget=budget, policy=policy, **host)  # type: ignore[arg-type]


def memory(session: Session) -> list[bytes]:
    """All that is live in a session's memory, bit for bit."""
    layers = session._runner.pond.state().storage.layers
    live = [tensor for layer in layers for tensor in (*layer.tensors.values(), *layer.quantized.values())]
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in live]


def lived(session: Session, index: int) -> tuple[list[int], list[int], list[bytes]]:
    """What is answered early, what later, and all that lies in memory then; streams differ in length."""
    session.feed(list(moving(17 + 2 * index, seed=index)))
    early = session.ask(QUESTION, max_new_tokens=2 + index).token_ids
    session.feed(list(moving(24 - 2 * index, seed=9 + index)))
    return early, session.ask(QUESTION, max_new_tokens=5).token_ids, memory(session)


def row_by_row(family: Family) -> None:
    """Make what a linear layer gives for a row independent of how many rows there are."""
    for module in [*family.decoder.modules(), family.model.lm_head]:  # type: ignore[attr-defined]
        if isinstance(module, torch.nn.Linear):
            module.forward = partial(each_row, module)  # type: ignore[method-assign]


def each_row(module: torch.nn.Linear, x: Tensor) -> Tensor:
    rows = [linear(row, module.weight, module.bias) for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).view(*x.shape[:-1], -1)


def of(name: str) -> tuple[str, ...]:
    """Policies that sessions of a family run in these tests: all on one family, two kinds of storage on each of the others."""
    return POLICIES if name == "qwen2_5_vl" else ("infinipot-v", "h2o" if name == "qwen3_vl" else "keydiff+diversity")


@pytest.mark.parametrize("name", FAMILIES)
def test_but_for_linear_layers_a_life_is_as_alone_bit_for_bit(name: str) -> None:
    family = tiny(name)
    row_by_row(family)
    alone = [lived(opened(family, index, policy), index) for index, policy in enumerate(of(name))]
    lockstep = Lockstep(family)
    sessions = [opened(lockstep.gateway(), index, policy) for index, policy in enumerate(of(name))]
    together = lockstep.run(*(partial(lived, session, index) for index, session in enumerate(sessions)))
    for (*said, held), (*expected, kept) in zip(together, alone, strict=True):
        assert said == expected
        differ = [(one, other) for one, other in zip(held, kept, strict=True) if one != other]
        # Older versions of transformers hand one session's attention over in another form than ours, and the last bits may differ.
        assert not differ or RELEASE < LAST_TESTED
        for one, other in differ:
            np.testing.assert_allclose(np.frombuffer(one, np.float32), np.frombuffer(other, np.float32), atol=1e-6)
    assert max(lockstep.sizes) == len(sessions)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in FAMILIES), ("qwen2_5_vl", "bfloat16")])
def test_answers_of_several_are_the_tokens_of_each(name: str, dtype: str) -> None:
    """With hidden states that differ by what linear layers round: bounds of both are in docs/batching.md."""
    family = tiny(name, dtype=getattr(torch, dtype))
    sessions = [opened(family, index, policy) for index, policy in enumerate(of(name))]
    for index, session in enumerate(sessions):
        session.feed(list(moving(40 - 3 * index, seed=index)))

    def answer(batched: bool) -> tuple[list[list[int]], list[Tensor]]:
        runners, said, hidden = [session._runner for session in sessions], [], []
        marks = [runner.mark() for runner in runners]
        turns = [family.question(QUESTION, after_video=True) for _ in runners]
        for _ in range(8):
            requests = []
            for runner, turn in zip(runners, turns, strict=True):
                turn, positions = dated(turn, 0), family.assign_positions(turn, runner.clock)
                runner.pond.write_metadata(turn.time_us, turn.grid_position, positions)
                requests.append(Request(turn, positions, runner.pond))
            if batched:
                rows = [good(each)[-1] for each in forward_batch(family, requests)]
                scores = [good(each) for each in logits_batch(family, rows)]
            else:
                rows = [family.forward(each.tokens, each.positions, each.cache)[-1] for each in requests]
                scores = [family.logits(each) for each in rows]
            hidden += rows
            said.append([int(each.argmax()) for each in scores])
            turns = [family.embed([token]) for token in said[-1]]
        for runner, mark in zip(runners, marks, strict=True):
            runner.rewind(mark)
        return said, hidden

    (alone, theirs), (together, ours) = answer(False), answer(True)
    assert together == alone
    close = {"float32": 1e-5, "bfloat16": 5e-2}[dtype]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=close)


def test_large_linear_layers_of_a_few_rows_are_ours_within_a_batch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    family, taken = tiny("qwen2_5_vl"), list[int]()

    def counted(x: Tensor, *others: Tensor) -> Tensor:
        taken.append(x.numel() // x.shape[-1])
        return linear(x, *others)

    monkeypatch.setattr(batching, "LARGE", 1)
    monkeypatch.setattr(batching, "few_rows_product", counted)
    logits_batch(family, [torch.ones(family.hidden)] * 3)
    logits_batch(family, [torch.ones(family.hidden)] * 17)
    family.logits(torch.ones(family.hidden))
    assert taken == [3]


def test_another_thread_goes_on_with_its_own_session_meanwhile() -> None:
    family = tiny("qwen2_5_vl")
    alone = lived(opened(family, 0, "h2o"), 0)
    beside: list[object] = []
    thread = threading.Thread(target=lambda: beside.append(lived(opened(family, 0, "h2o"), 0)))
    requests = []
    for index in range(2):
        pond = opened(family, index, "infinipot-v")._runner.pond
        tokens, positions = family.embed([5 + index]), torch.full((3, 1), pond.length)
        pond.write_metadata(tokens.time_us, tokens.grid_position, positions)
        requests.append(Request(tokens, positions, pond))
    thread.start()
    batches = 0
    while thread.is_alive():
        for request, result in zip(requests, forward_batch(family, requests), strict=True):
            good(result)
            request.cache.truncate(request.cache.length - 1)
        batches += 1
    thread.join()
    assert batches > 1
    assert beside == [alone]


class Refused(Exception):
    pass


def refuse(layer: int, queries: Tensor) -> None:
    if layer == 1:
        raise Refused


def test_what_one_raises_is_its_own() -> None:
    """Whatever fails, and when: the others' results arrive, and the memory of the one that failed can be taken back."""
    family = tiny("qwen2_5_vl")
    sessions = [opened(family, 0, "h2o") for _ in range(6)]
    for index, session in enumerate(sessions):
        session.feed(list(moving(20 + 2 * index, seed=index)))
    runners = [session._runner for session in sessions]
    before, marks = [memory(session) for session in sessions], [runner.mark() for runner in runners]
    frames = [
        family.encode([family.prepare(f.pixels) for f in moving(4, seed=index)], [0, 1, 2, 3]) for index in range(6)
    ]
    requests = []
    for index, (runner, tokens) in enumerate(zip(runners, frames, strict=True)):
        positions = family.assign_positions(tokens, runner.clock)
        if index == 2:
            tokens = Tokens(tokens.embeds[:, 1:], tokens.grid_position, tokens.time_us, tokens.visual)
        if index == 4:
            runner.pond.storage.reserve(runner.pond.free)
        see = refuse if index in (1, 3) else None
        requests.append(Request(tokens, positions, runner.pond, see, before=index == 3))
    results = forward_batch(family, requests)
    assert [type(results[index]) for index in (1, 3, 4)] == [Refused, Refused, BudgetError]
    assert isinstance(results[2], Exception)
    for runner, mark in zip(runners, marks, strict=True):
        runner.rewind(mark)
    for index in (0, 5):
        alone = family.forward(requests[index].tokens, requests[index].positions, runners[index].pond)
        torch.testing.assert_close(good(results[index]), alone, rtol=0, atol=1e-5)
        runners[index].rewind(marks[index])
    assert [memory(session) for session in sessions] == before


def test_two_requests_cannot_share_a_cache() -> None:
    family = tiny("qwen2_vl")
    request = Request(family.embed([5]), torch.zeros(3, 1, dtype=torch.long), opened(family, 0, "recent")._runner.pond)
    with pytest.raises(MillpondError, match="name the same cache"):
        forward_batch(family, [request, request])


def good(result: Tensor | Exception) -> Tensor:
    assert isinstance(result, Tensor), result
    return result


@pytest.mark.parametrize("case", ["one", "eager", "pond cache"])
def test_what_cannot_be_packed_runs_alone_bit_for_bit(case: str) -> None:
    family = tiny("llava_onevision", attn_implementation="eager" if case == "eager" else "sdpa")

    def requests() -> list[Request]:
        made = []
        for index in range(1 if case == "one" else 2):
            tokens, cache = family.embed([5, 6 + index, 7]), opened(family, index, "recent")._runner.pond
            if case == "pond cache":
                cache = PondCache(family.model, "1MiB")
            positions = torch.arange(cache.length, cache.length + 3)[None]
            if case != "pond cache":
                cache.write_metadata(tokens.time_us, tokens.grid_position, positions)
            made.append(Request(tokens, positions, cache))
        return made

    theirs = [family.forward(each.tokens, each.positions, each.cache) for each in requests()]
    for one, other in zip(forward_batch(family, requests()), theirs, strict=True):
        assert torch.equal(good(one), other)


def test_nested_weights_choose_a_width_for_each_decoding_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is decoded beside a block runs at the width that it would have alone, not at a prompt's."""
    family = tiny("qwen2_5_vl")
    for layer in family.decoder.layers:  # type: ignore[attr-defined]
        weight = layer.mlp.down_proj.weight.detach()
        down = NestedLinear(nest(weight, torch.ones_like(weight), low=3, high=4))
        down.set_bits(3, 4)
        down.choose = lambda rows: rows[:, 0] > 0
        layer.mlp.down_proj = down
    ponds = [opened(family, index, "recent")._runner.pond for index in range(4)]
    requests, theirs = [], []
    for index, pond in enumerate(ponds):
        tokens, length = family.embed([5 + index] * (1 if index < 3 else 4)), pond.length
        positions = torch.arange(length, length + len(tokens)).expand(3, -1)
        pond.write_metadata(tokens.time_us, tokens.grid_position, positions)
        requests.append(Request(tokens, positions, pond))
        theirs.append(family.forward(tokens, positions, pond))
        pond.truncate(length)
    counts = [dict(layer.mlp.down_proj.counts) for layer in family.decoder.layers]  # type: ignore[attr-defined]
    for one, other in zip(forward_batch(family, requests), theirs, strict=True):
        torch.testing.assert_close(good(one), other, rtol=0, atol=1e-5)
    for layer, before in zip(family.decoder.layers, counts, strict=True):  # type: ignore[attr-defined]
        assert layer.mlp.down_proj.counts == {width: 2 * count for width, count in before.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_frames_of_several_streams_are_encoded_as_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With uneven groups, frames of two sizes, and a block that cannot be encoded."""
    family, calls = tiny(name), list[int]()
    several = type(family).encode_several
    monkeypatch.setattr(
        type(family), "encode_several", lambda self, blocks: calls.append(len(blocks)) or several(self, blocks)
    )
    blocks = []
    for index, (count, side) in enumerate([(3, 56), (4, 56), (2, 84), (1, 56), (2, 84)]):
        frames = [family.prepare(f.pixels) for f in moving(count, height=side, width=side, seed=index)]
        blocks.append((frames, [1_000_000 * at + index for at in range(count)]))
    blocks.insert(2, ([], []))
    results = encode_batch(family, blocks)
    packed = list(calls)
    assert isinstance(results[2], Exception)
    for result, block in zip(results, blocks, strict=True):
        if block[0]:
            assert isinstance(result, Tokens)
            alone = family.encode(*block)
            for field in ("grid_position", "time_us", "visual"):
                assert torch.equal(getattr(result, field), getattr(alone, field))
            for one, other in zip((result.embeds, *result.deepstack), (alone.embeds, *alone.deepstack), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
                assert not one.is_inference()
                assert one.untyped_storage().nbytes() == one.nbytes
    assert sum(packed) >= len(blocks)
    assert max(packed) >= 3


def test_a_method_that_a_family_overrides_is_not_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny("llava_onevision")
    seen = []

    class Own(type(family)):  # type: ignore[misc]
        def encode(self, frames: list[np.ndarray], times_us: list[int]) -> Tokens:
            seen.append(len(frames))
            return super().encode(frames, times_us)  # type: ignore[no-any-return]

    monkeypatch.setattr(family, "__class__", Own)
    block = ([family.prepare(f.pixels) for f in moving(2)], [0, 1])
    encode_batch(family, [block, block])
    assert seen == [2, 2]
