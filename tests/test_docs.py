"""The pages for people: short, narrow, and true about files, folders, commands and options."""

import re
from pathlib import Path
from typing import Any

import typer

from millpond.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md"))]
MOST_WORDS, MOST_COLUMNS = 1500, 100
GENERATED_OR_GROWING = {"cli.md", "log.md", "glossary.md"}


def prose(page: Path) -> list[str]:
    """The lines of a page that can be broken: no code, tables, images."""
    lines: list[str] = []
    code = False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.lstrip().startswith("```")
        code ^= fence
        if not (code or fence or line.lstrip().startswith(("|", "![")) or line.startswith("    ")):
            lines.append(line)
    return lines


def shell(page: Path) -> list[str]:
    """The commands of a page's shell blocks, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line.split(" #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_pages_are_short_and_narrow() -> None:
    long = {}
    for page in PAGES:
        words = [word for word in page.read_text(encoding="utf-8").split() if set(word) - set("|-")]
        assert len(words) <= MOST_WORDS or page.name in GENERATED_OR_GROWING, f"{page}: {len(words)} words"
        if wide := [line for line in prose(page) if len(line) > MOST_COLUMNS]:
            long[str(page)] = wide
    assert not long


def test_what_pages_point_to_is_there() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        linked = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
        named = re.findall(
            r"\b(?:tests|bench|docs|src|training|examples)/[\w./-]+\.(?:py|md|json|cpp|png|svg|yml)\b", text
        )
        missing = [link for link in linked if not (page.parent / link).exists()]
        missing += [name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()]
        assert missing == [], page


def test_the_map_of_the_tree_names_every_folder_of_the_package() -> None:
    package = ROOT / "src" / "millpond"
    named = set(re.findall(r"`([\w/]+)/`", (DOCS / "tree.md").read_text(encoding="utf-8")))
    files = re.findall(r"^\| (`[^|]*`) \|", (DOCS / "tree.md").read_text(encoding="utf-8"), re.MULTILINE)
    there = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_dir()}
    assert {name for name in there if not re.search(r"__pycache__|prebuilt", name)} <= named
    listed = {name for cell in files for name in re.findall(r"`([^`*]+)`", cell) if not name.startswith("make ")}
    assert [name for name in listed if not ((package / name).exists() or (ROOT / name).exists())] == []


def options(command: Any, words: list[str]) -> set[str]:
    """The options of the command that the words name."""
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return {option for parameter in command.params for option in parameter.opts}


def test_commands_and_options_exist() -> None:
    root = typer.main.get_command(app)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    seen = 0
    for page in PAGES:
        for line in shell(page):
            program, *words = line.split()
            if program == "make":
                assert words[0] in targets, f"{page.name}: {line}"
            elif program == "millpond":
                given = {word.partition("=")[0] for word in words if word.startswith("--")}
                assert given <= options(root, words), f"{page.name}: {line}"
            seen += program in ("make", "millpond")
    assert seen > 10
