"""The arena: regions move, live rows keep their bytes."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.cache.storage.arena import Arena
from millpond.cache.storage.layer import PondLayer
from millpond.memory.geometry import Geometry
from millpond.memory.resumable import Steps
from tests.session.measure import transient_peak

GEOMETRY = Geometry(layers=4, kv_heads=2, head_dim=8, dtype=torch.float32, axes=3)


def filled(capacities: list[int], lengths: list[int]) -> tuple[Arena, list[PondLayer], list[list[torch.Tensor]]]:
    layers = [PondLayer(GEOMETRY, 0, torch.device("cpu")) for _ in capacities]
    arena = Arena(layers, capacities)
    for layer, length in zip(layers, lengths, strict=True):
        layer.length = length
        for tensor in layer.tensors():
            tensor[:, :length] = torch.randint(1, 100, tensor[:, :length].shape).to(tensor.dtype)
    return arena, layers, [[tensor[:, : layer.length].clone() for tensor in layer.tensors()] for layer in layers]


def same(layers: list[PondLayer], before: list[list[torch.Tensor]]) -> bool:
    return all(
        torch.equal(tensor[:, : layer.length], old)
        for layer, olds in zip(layers, before, strict=True)
        for tensor, old in zip(layer.tensors(), olds, strict=True)
    )


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), chunk=st.integers(1, 40))
def test_any_cut_after_any_cut(seed: int, chunk: int) -> None:
    choose = random.Random(seed)
    lengths = [choose.randint(0, 30) for _ in range(4)]
    slots = sum(lengths) + choose.randint(0, 60)

    def capacities() -> list[int]:
        sizes = list(lengths)
        for _ in range(slots - sum(lengths)):
            sizes[choose.randrange(4)] += 1
        return sizes

    arena, layers, before = filled(capacities(), lengths)
    size, storage = arena.nbytes, arena.flat("keys").data_ptr()
    for _ in range(4):
        wanted = capacities()
        Steps(arena.cutting(wanted, lengths, chunk)).run()
        assert arena.capacities == wanted
        assert same(layers, before)
    Steps([*arena.gathering(chunk), *arena.scattering(capacities(), chunk)]).run()
    assert same(layers, before)
    assert (arena.nbytes, arena.flat("keys").data_ptr()) == (size, storage)
    assert size == slots * GEOMETRY.bytes_per_token // 4


def test_a_cut_allocates_one_chunk_and_refuses_more_than_there_is() -> None:
    lengths = [400, 90, 90, 90]
    arena, _, _ = filled([500, 100, 100, 100], lengths)
    peak = transient_peak(Steps(arena.cutting([410, 130, 130, 130], lengths, 16)).run)
    assert 0 < peak <= 16 * 8 * 4
    with pytest.raises(AssertionError):
        arena.cutting([500, 130, 130, 130], lengths, 16)
