"""Small frozen objects as plain values, and back from values that nobody vouches for: no name in them is ever looked up, no code run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from millpond.errors import SnapshotError

T = TypeVar("T")
# Microseconds of the farthest stream time fit; far below what overflows 64 bits when something is added.
_MOST = 1 << 57
_TENSOR, _OBJECT, _LIST, _NUMBER = "tensor", "object", "list", "number"


def to_values(made: Any) -> dict[str, Any]:
    """A dataclass of numbers and words by its field names."""
    return {field.name: getattr(made, field.name) for field in fields(made)}


def from_values(kind: type[T], values: Any, **known: Any) -> T:
    """What `to_values` gave, as the `kind` that it was; fields in `known` come from there.

    Raises:
        ValueError: the values are not those of such an object.
    """
    hints = get_type_hints(kind)
    names = {field.name for field in fields(cast(Any, kind))} - set(known)
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(f"no {kind.__name__} has these fields")
    for name in names:
        if not any(_is(values[name], one) for one in _allowed(hints[name])):
            raise ValueError(f"{kind.__name__}.{name} cannot be {_shown(values[name])}")
    return kind(**values, **known)


def number(value: Any, least: int = 0, most: int = _MOST) -> int:
    """A whole number within bounds.

    Raises:
        ValueError: it is none.
    """
    if not _is(value, int) or not least <= value <= most:
        raise ValueError(f"{_shown(value)} is no number from {least} to {most}")
    return int(value)


def numbers(values: Any, least: int = 0, most: int = _MOST) -> list[int]:
    """A list of whole numbers within bounds.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(values, list):
        raise ValueError(f"{_shown(values)} is no list")
    return [number(value, least, most) for value in values]


def _allowed(hint: Any) -> list[Any]:
    """The classes that a field may have, as it is annotated."""
    if get_origin(hint) in (Union, UnionType):
        return [kind for one in get_args(hint) for kind in _allowed(one)]
    return [get_origin(hint) or hint]


def _is(value: Any, kind: Any) -> bool:
    if kind is int:
        return type(value) is int and abs(value) <= _MOST
    if kind is float:
        return type(value) is float or (type(value) is int and abs(value) <= _MOST)
    return kind is Any or (isinstance(kind, type) and type(value) is kind)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, int | float | bool | NoneType) and abs(value or 0) < _MOST else "that"


# --- what an admission remembers ------------------------------------------------------------------------------------


def encode(value: Any, put: Callable[[Tensor], str], kinds: Sequence[type]) -> Any:
    """Nested values as JSON takes them; `put` stores a tensor and gives its name.

    Args:
        kinds: the dataclasses that may be among them.

    Raises:
        SnapshotError: something else is.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {_NUMBER: repr(float(value))}
    if isinstance(value, bool | int | float | str | NoneType):
        return value
    if isinstance(value, Tensor):
        return {_TENSOR: put(value)}
    if type(value) in kinds and is_dataclass(value):
        parts = {field.name: encode(getattr(value, field.name), put, kinds) for field in fields(value)}
        return {_OBJECT: type(value).__name__, "fields": parts}
    if isinstance(value, tuple):
        return {_LIST: [encode(one, put, kinds) for one in value]}
    raise SnapshotError(
        f"{type(value).__name__} cannot be saved: what an admission remembers must be numbers, words, tensors, tuples of them, or "
        "dataclasses that it names in `state_types`"
    )


def decode(value: Any, get: Callable[[str], Tensor], kinds: Sequence[type]) -> Any:
    """What `encode` was given.

    Raises:
        ValueError: it cannot have been.
    """
    if isinstance(value, bool | int | float | str | NoneType):
        return value
    if isinstance(value, dict) and set(value) == {_NUMBER} and value[_NUMBER] in ("nan", "inf", "-inf"):
        return float(value[_NUMBER])
    known = {kind.__name__: kind for kind in kinds}
    if isinstance(value, dict) and set(value) == {_TENSOR} and isinstance(value[_TENSOR], str):
        return get(value[_TENSOR])
    if isinstance(value, dict) and set(value) == {_LIST} and isinstance(value[_LIST], list):
        return tuple(decode(one, get, kinds) for one in value[_LIST])
    if isinstance(value, dict) and set(value) == {_OBJECT, "fields"} and value[_OBJECT] in known:
        parts = value["fields"]
        if isinstance(parts, dict):
            return from_values(known[value[_OBJECT]], {name: decode(part, get, kinds) for name, part in parts.items()})
    raise ValueError("what an admission remembers is none of its states")


def described(made: Any) -> Any:
    """A policy or an admission with all its parameters, by names and plain values, to be compared.

    Raises:
        SnapshotError: a parameter is nothing that can be written down.
    """
    if isinstance(made, float) and not math.isfinite(made):
        return repr(float(made))  # which JSON does not know
    if isinstance(made, bool | int | float | str | NoneType):
        return made
    if isinstance(made, tuple | list):
        return [described(one) for one in made]
    if isinstance(made, torch.dtype):
        return str(made)
    if isinstance(made, Mapping):
        return {str(name): described(one) for name, one in made.items()}
    if is_dataclass(made) and not isinstance(made, type):
        name = getattr(made, "name", type(made).__name__)
        return {"name": name, **{field.name: described(getattr(made, field.name)) for field in fields(made)}}
    raise SnapshotError(f"{type(made).__name__} cannot be saved: a policy's parameters must be plain values")
