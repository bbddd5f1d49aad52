"""Where code can be mutated, and how: cosmic-ray's operators, and the removal of a statement, which it lacks.

Left out is what changes no behaviour by construction: annotations (never evaluated here), `if TYPE_CHECKING`, `__all__`, the removal of
`@abstractmethod`, `==` made `is`, and whatever compiles to the same syntax tree.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import parso
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator

__all__ = ["Mutant", "draw", "sites"]

_STATEMENTS = {"expr_stmt", "atom_expr", "del_stmt", "raise_stmt", "keyword", "yield_expr", "assert_stmt"}
# Of statements with a body a mutation in the head belongs to the head alone.
_SIMPLE = {"simple_stmt"}
_COMPOUND = {"if_stmt", "for_stmt", "while_stmt", "with_stmt", "try_stmt", "decorator", "funcdef", "classdef"}
_IDENTITY = {"Is", "IsNot"}


class RemoveStatement(Operator):
    """An assignment, a call, a `raise`, a `del` or a `return` of nothing, replaced by `pass`."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type != "simple_stmt" or node.children[0].type not in _STATEMENTS:
            return
        if node.parent.type == "file_input" or node.children[0].get_code().strip() == "pass":
            return  # of a module: a name that is missing afterwards, which any import shows
        yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        leaf = node.get_first_leaf()
        node.children[0] = parso.python.tree.Name("pass", node.start_pos, prefix=leaf.prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class ReturnNone(Operator):
    """`return x` made `return None`."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "return_stmt":
            yield node.children[1].start_pos, node.children[1].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.children[1] = parso.parse(" None")
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        path: of the file, from the repository's root.
        operator: its name. occurrence: which of the places that it finds in the file.
        lines: first and last line of the statement that is changed.
        before, after: the changed lines as they were and are.
    """

    path: str
    operator: str
    occurrence: int
    lines: tuple[int, int]
    before: str
    after: str

    def source(self, root: Path) -> str:
        """The whole file, mutated."""
        code = mutate_code((root / self.path).read_text(), _operators()[self.operator], self.occurrence)
        assert code is not None
        return str(code)


@cache
def _operators() -> dict[str, Operator]:
    named = {}
    for name in plugins.operator_names():
        kind = plugins.get_operator(name)
        short = name.split("/")[-1]
        if not kind.arguments() and short.split("_")[-1] not in _IDENTITY:
            named[short] = kind()
    # Of `is` and `is not` there is only one other that means something.
    for short in ("Is_IsNot", "IsNot_Is"):
        name = f"ReplaceComparisonOperator_{short}"
        named[name] = plugins.get_operator(f"core/{name}")()
    return {**named, "RemoveStatement": RemoveStatement(), "ReturnNone": ReturnNone()}


Site = tuple[str, int, tuple[int, int]]
"""Operator, its occurrence, first and last line of the statement."""


def sites(code: str) -> dict[tuple[Any, Any], list[Site]]:
    """All places of a file that can be mutated, with what can be done there."""
    nodes = list(ast_nodes(get_ast(code)))
    found: dict[tuple[Any, Any], list[Site]] = {}
    for name, operator in _operators().items():
        places = ((node, place) for node in nodes for place in operator.mutation_positions(node))
        for occurrence, (node, place) in enumerate(places):
            if not _idle(node):
                found.setdefault(place, []).append((name, occurrence, _statement(node, place)))
    return found


def draw(root: Path, paths: Iterable[str], size: int, seed: int) -> list[Mutant]:
    """A random sample, each file with its share of all places: first a place, then one of the changes possible there."""
    chance = random.Random(seed)
    places = {path: sites((root / path).read_text()) for path in paths}
    places = {path: found for path, found in places.items() if found}
    total = sum(map(len, places.values()))
    drawn: list[Mutant] = []
    for path, found in sorted(places.items()):
        share = max(1, round(size * len(found) / total))
        order = sorted(found)
        chance.shuffle(order)
        picked = (
            mutant for place in order if (mutant := _mutant(root, path, chance.sample(found[place], len(found[place]))))
        )
        drawn += [mutant for _, mutant in zip(range(share), picked, strict=False)]
    chance.shuffle(drawn)
    return drawn


def _mutant(root: Path, path: str, ways: list[Site]) -> Mutant | None:
    """The first way that changes the program."""
    code = (root / path).read_text()
    for name, occurrence, lines in ways:
        mutated = mutate_code(code, _operators()[name], occurrence)
        try:
            if mutated is None or ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(code)):
                continue
        except SyntaxError:
            continue
        old, new = code.splitlines(), mutated.splitlines()
        head = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
        tail = next(i for i, (a, b) in enumerate(zip(old[::-1], new[::-1], strict=False)) if a != b)
        before, after = old[head : len(old) - tail], new[head : len(new) - tail]
        return Mutant(path, name, occurrence, lines, _joined(before), _joined(after))
    return None


def _joined(lines: list[str]) -> str:
    return " ".join(line.strip() for line in lines)


def _statement(node: Any, place: tuple[Any, Any]) -> tuple[int, int]:
    """First and last line of the statement around a place; of one with a body, down to the place only; all of a function whose head it is."""
    while node.type not in _SIMPLE and node.type not in _COMPOUND:
        node = node.parent
    if node.type in _SIMPLE:
        return node.start_pos[0], node.children[0].end_pos[0]
    if node.type in ("decorator", "funcdef"):
        whole = node.parent if node.type == "decorator" else node
        return whole.start_pos[0], whole.end_pos[0] - 1
    return node.start_pos[0], place[1][0]


def _idle(node: Any) -> bool:
    """Whether a node is only for readers and type checkers."""
    if node.type == "decorator" and "abstractmethod" in node.get_code():
        return True
    while node.parent is not None:
        above = node.parent
        if above.type == "annassign" and node is above.children[1]:
            return True
        if above.type == "tfpdef" and node is above.children[2]:
            return True
        if above.type == "funcdef" and node is above.annotation:
            return True
        if node.type == "if_stmt" and "TYPE_CHECKING" in node.children[1].get_code():
            return True
        if node.type == "expr_stmt" and node.get_code().strip().startswith("__all__"):
            return True
        if node.type == "import_from":
            return True
        node = above
    return False
