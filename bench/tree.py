"""The source tree in numbers: lines, the longest file, import circles, public names. Runs on any checkout, also an older one.

python bench/tree.py [CHECKOUT ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Graph = dict[str, set[str]]
_SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(source: str) -> int:
    """Lines that hold more than a comment or a docstring."""
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _SILENT:
            held.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for part in body:
                if (
                    isinstance(part, ast.Expr)
                    and isinstance(part.value, ast.Constant)
                    and isinstance(part.value.value, str)
                ):
                    held.difference_update(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    return len(held)


def imports(package: Path) -> Graph:
    """Which modules import which: at the top, within functions and for type checkers alike."""
    names = {".".join(path.relative_to(package.parent).with_suffix("").parts): path for path in package.rglob("*.py")}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph: Graph = {name: set() for name in names}
    for name, path in names.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                found = {each if each in names else node.module for each in wanted}
            elif isinstance(node, ast.Import):
                found = {alias.name for alias in node.names}
            else:
                continue
            graph[name] |= {each for each in found if each in names and each != name}
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan, 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> Iterator[list[str]]:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                yield from visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                yield sorted(group)

    for name in sorted(graph):
        if name not in order:
            found += list(visit(name))
    return found


def public_names(package: Path) -> int:
    """Names in `millpond.__all__`."""
    for node in ast.parse((package / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return len(ast.literal_eval(node.value))
    return 0


def measure(checkout: Path) -> dict[str, Any]:
    """All of it for one checkout."""
    package = checkout / "src" / "millpond"
    sources = {path: path.read_text() for path in package.rglob("*.py")}
    lines = {path: len(text.splitlines()) for path, text in sources.items()}
    longest = max(lines, key=lambda path: lines[path])
    return {
        "files": len(sources),
        "lines": sum(lines.values()),
        "code_lines": sum(code_lines(text) for text in sources.values()),
        "longest_file": str(longest.relative_to(package)),
        "longest_file_lines": lines[longest],
        "import_circles": [len(group) for group in circles(imports(package))],
        "public_names": public_names(package),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path()])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sys.setrecursionlimit(10_000)
    found = [measure(checkout) for checkout in args.checkouts]
    text = json.dumps(found, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
