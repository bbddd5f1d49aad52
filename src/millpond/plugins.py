"""Named classes from any package, by entry point, and those of them that are parameterised."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from millpond.errors import MillpondError, PolicyError, first_line

T = TypeVar("T")


class Registered(Generic[T]):
    """The classes that packages register under one entry point group. Built-in ones may register alike.

    Args:
        group: the entry point group.
        base: what each must be a subclass of.
        word: what one is called in messages.
        error: what is raised of one that cannot be used.
    """

    def __init__(self, group: str, base: type[T], word: str, error: type[MillpondError]) -> None:
        self.group, self.base, self.word, self.error = group, base, word, error

    @cached_property
    def found(self) -> dict[str, EntryPoint]:
        """Every registered name, loaded or not."""
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self.group):
            # A built-in name means the built-in thing, whatever else is installed.
            if entry.name not in found or entry.module.startswith("millpond."):
                found[entry.name] = entry
        return found

    def load(self, name: str) -> type[T]:
        """The class that is registered under one of the names in `found`.

        Raises:
            MillpondError: of the kind `error`: it cannot be imported, or is not what it is registered as.
        """
        entry = self.found[name]
        named = f"the {self.word} {entry.name!r} ({entry.value})"
        try:
            loaded = entry.load()
        except Exception as error:
            raise self.error(f"{named} cannot be loaded: {first_line(error)}") from error
        if not (isinstance(loaded, type) and issubclass(loaded, self.base)):
            raise self.error(f"{named} is not a millpond {self.base.__name__}")
        if fault := self.fault(loaded, name):
            raise self.error(f"{named} {fault}")
        return loaded

    def fault(self, loaded: type[T], name: str) -> str | None:
        """What is wrong with a class that is registered under `name`, to go on in a sentence about it; None where nothing is."""
        return None if getattr(loaded, "name", None) == name else "must have this as its class attribute `name`"

    def loadable(self) -> dict[str, type[T]]:
        """All that can be loaded, by name, in order; one that cannot is left out (`load` says why)."""
        loaded = {}
        for name in sorted(self.found):
            try:
                loaded[name] = self.load(name)
            except MillpondError:
                continue
        return loaded


class Plugins(Registered[T]):
    """Registered classes that are frozen dataclasses, made with parameters. The class attribute `name` of each is the entry point's."""

    def __init__(self, group: str, base: type[T], word: str) -> None:
        super().__init__(group, base, word, PolicyError)

    def available(self) -> tuple[type[T], ...]:
        """All that can be loaded, by name; one that cannot is left out (`get` says why)."""
        return tuple(self.loadable().values())

    def get(self, name: str, **parameters: Any) -> T:
        """Make one by name.

        Raises:
            PolicyError: unknown name (lists the known ones), broken package, unknown or impossible parameter.
        """
        if name not in self.found:
            raise PolicyError(f"no {self.word} is called {name!r}; there are: {', '.join(sorted(self.found))}")
        chosen = self.load(name)
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
