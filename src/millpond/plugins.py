"""Named, parameterised classes from any package, by entry point. Knows nothing about what they do."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from millpond.errors import PolicyError

__all__ = ["Plugins"]

T = TypeVar("T")


class Plugins(Generic[T]):
    """The frozen dataclasses that packages register under one entry point group. Built-in ones register alike.

    Args:
        group: the entry point group.
        base: what each must be a subclass of; its class attribute `name` must be the entry point's.
        word: what one is called in messages.
    """

    def __init__(self, group: str, base: type[T], word: str) -> None:
        self.group, self.base, self.word = group, base, word

    @cached_property
    def found(self) -> dict[str, EntryPoint]:
        """Every registered name, loaded or not."""
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self.group):
            # A built-in name means the built-in thing, whatever else is installed.
            if entry.name not in found or entry.module.startswith("millpond."):
                found[entry.name] = entry
        return found

    def _load(self, entry: EntryPoint) -> type[T]:
        named = f"the {self.word} {entry.name!r} ({entry.value})"
        try:
            loaded = entry.load()
        except Exception as error:
            raise PolicyError(f"{named} cannot be loaded: {error}") from error
        if not (isinstance(loaded, type) and issubclass(loaded, self.base)):
            raise PolicyError(f"{named} is not a millpond {self.base.__name__}")
        if getattr(loaded, "name", None) != entry.name:
            raise PolicyError(f"{named} must have this as its class attribute `name`")
        return loaded

    def available(self) -> tuple[type[T], ...]:
        """All that can be loaded, by name; one that cannot is left out (`get` says why)."""
        loaded = []
        for _, entry in sorted(self.found.items()):
            try:
                loaded.append(self._load(entry))
            except PolicyError:
                continue
        return tuple(loaded)

    def get(self, name: str, **parameters: Any) -> T:
        """Make one by name.

        Raises:
            PolicyError: unknown name (lists the known ones), broken package, unknown or impossible parameter.
        """
        entry = self.found.get(name)
        if entry is None:
            raise PolicyError(f"no {self.word} is called {name!r}; there are: {', '.join(sorted(self.found))}")
        chosen = self._load(entry)
        known = [field.name for field in fields(chosen)]  # type: ignore[arg-type]
        if unknown := sorted(set(parameters) - set(known)):
            raise PolicyError(f"{name} has no parameter {unknown[0]!r}; it has: {', '.join(known) or 'none'}")
        for field in fields(chosen):  # type: ignore[arg-type]
            value = parameters.get(field.name)
            numeric = isinstance(field.default, int | float) and not isinstance(field.default, bool)
            if (numeric and isinstance(value, str)) or (isinstance(value, float) and not math.isfinite(value)):
                raise PolicyError(f"{name}: {field.name} must be a finite number, not {value}")
        try:
            return chosen(**parameters)
        except (TypeError, ValueError) as error:
            given = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
            raise PolicyError(f"{name} cannot be made with {given or 'no parameters'}: {error}") from error

    def read(self, text: str) -> T:
        """Make one from one word: `name`, or `name:parameter=value:...` as in `infinipot-v:alpha=0.3:pooling=1`.

        Raises:
            PolicyError: not of this form, or as `get`.
        """
        name, *pairs = text.split(":")
        parameters: dict[str, Any] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                raise PolicyError(f"{text!r}: write parameters as {name}:parameter=value")
            try:
                parameters[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                parameters[key] = value  # a word
        return self.get(name, **parameters)

    def write(self, made: T) -> str:
        """The word that `read` makes an equal one from; of the parameters those that are not as published.

        Raises:
            PolicyError: there is no such word.
        """
        given = [
            f"{field.name}={getattr(made, field.name)!r}"
            for field in fields(made)  # type: ignore[arg-type]
            if getattr(made, field.name) != field.default
        ]
        return self.same(made, ":".join([made.name, *given]), self.read)  # type: ignore[attr-defined]

    def same(self, made: T, word: str, read: Callable[[str], T]) -> str:
        """The word, if `read` makes the same of it.

        Raises:
            PolicyError: it does not.
        """
        try:
            if read(word) == made:
                return word
        except PolicyError:
            pass
        raise PolicyError(f"the {self.word} {made!r} cannot be written in one word")
