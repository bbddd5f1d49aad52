"""For the API reference: names that share a line of a docstring (`rows, columns: of the grid`) get a line each."""

import re
from typing import Any

import griffe

_SHARED = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): ")


def separate(docstring: str) -> str:
    """The docstring with every shared line, and what continues it, written once for each name."""
    out: list[str] = []
    lines = docstring.splitlines()
    at = 0
    while at < len(lines):
        shared = _SHARED.match(lines[at])
        end = at + 1
        if shared:
            deeper = len(shared["indent"]) + 1
            while end < len(lines) and lines[end][:deeper].isspace():
                end += 1
            for name in shared["names"].split(", "):
                out += [f"{shared['indent']}{name}: {lines[at][shared.end() :]}", *lines[at + 1 : end]]
        else:
            out.append(lines[at])
        at = end
    return "\n".join(out)


class SharedLines(griffe.Extension):
    """Separates them in every docstring that griffe reads."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = separate(obj.docstring.value)
