"""A judge for open answers: any server with OpenAI's chat completions, by its address. Its verdicts lie beside the answers.

The words are those with which RVS is judged in the literature (Flash-VStream and ReKV, after Video-ChatGPT); they stand in every
result that rests on them.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from millpond.errors import MillpondError, first_line
from millpond.eval.benchmarks.base import Query, Verdict
from millpond.printable import printable

SYSTEM = (
    "You are an intelligent chatbot designed for evaluating the correctness of generative outputs for question-answer pairs. "
    "Your task is to compare the predicted answer with the correct answer and determine if they match meaningfully. "
    "Here's how you can accomplish the task:"
    "------"
    "##INSTRUCTIONS: "
    "- Focus on the meaningful match between the predicted answer and the correct answer.\n"
    "- Consider synonyms or paraphrases as valid matches.\n"
    "- Evaluate the correctness of the prediction compared to the answer."
)
USER = (
    "Please evaluate the following video-based question-answer pair:\n\n"
    "Question: {question}\n"
    "Correct Answer: {answer}\n"
    "Predicted Answer: {predicted}\n\n"
    "Provide your evaluation only as a yes/no and score where the score is an integer value between 0 and 5, "
    "with 5 indicating the highest meaningful match. "
    "Please generate the response in the form of a Python dictionary string with keys 'pred' and 'score', "
    "where value of 'pred' is  a string of 'yes' or 'no' and value of 'score' is in INTEGER, not STRING."
    "DO NOT PROVIDE ANY OTHER OUTPUT TEXT OR EXPLANATION. Only provide the Python dictionary string. "
    "For example, your response should look like this: {{'pred': 'yes', 'score': 4.8}}."
)
KEY = "MILLPOND_JUDGE_KEY"
"""The environment variable with the server's key, where it wants one."""
_VERDICTS = "verdicts.jsonl"
_TRIES, _SECONDS = 3, 120.0
_MOST_BYTES = 1 << 20


class Judge:
    """A judge model behind an address.

    Args:
        url: up to and with the version, such as http://127.0.0.1:8000/v1.
        model: its name there; by default the only one that the server lists.

    Raises:
        MillpondError: not an address, the server cannot be reached, or it lists several models.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise MillpondError("a judge's address begins with http:// or https://, such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise MillpondError(f"put the judge's key into {KEY}, not into its address")
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.model = model or self._only_model()

    def verdict(self, query: Query, predicted: str) -> Verdict | None:
        """What the judge says; None where it says nothing that can be read, three times.

        Raises:
            MillpondError: the server cannot be reached, or refuses.
        """
        told = USER.format(question=query.truth["question"], answer=query.truth["answer"], predicted=predicted)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": told}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 300}
        for _ in range(_TRIES):
            reply = self._call("/chat/completions", body)
            try:
                said = reply["choices"][0]["message"]["content"]
            except (KeyError, IndexError, TypeError):
                raise MillpondError(f"the judge at {printable(self.url)} does not answer in OpenAI's form") from None
            if isinstance(said, str) and (verdict := read_verdict(said)) is not None:
                return verdict
        return None

    def _only_model(self) -> str:
        reply = self._call("/models")
        try:
            names = [str(row["id"]) for row in reply["data"]]
        except (KeyError, TypeError):
            names = []
        if len(names) != 1:
            listed = f": it has {', '.join(map(printable, names[:8]))}" if names else ""
            raise MillpondError(f"name the judge's model with --judge-model{listed}")
        return names[0]

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                return json.loads(response.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            raise MillpondError(f"the judge at {printable(self.url)} refuses: {error.code} {error.reason}") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or first_line(error)
            raise MillpondError(f"the judge at {printable(self.url)} cannot be asked: {reason}") from error


def read_verdict(said: str) -> Verdict | None:
    """`{'pred': 'yes', 'score': 4}`, also with words around it; None where there is none. Points are cut to a whole number."""
    found = re.search(r"\{.*?\}", said, re.DOTALL)
    if found is None:
        return None
    try:
        row = ast.literal_eval(found[0])
        word, points = str(row["pred"]).lower(), int(float(row["score"]))
    except (ValueError, SyntaxError, TypeError, KeyError, OverflowError, MemoryError, RecursionError):
        return None
    if not ("yes" in word or "no" in word) or not 0 <= points <= 5:
        return None
    return Verdict("yes" in word, points)


def judge_all(judge: Judge, asked: Iterable[tuple[Query, str]], folder: Path) -> Iterator[None]:
    """Judge every answer that this judge has not seen yet; yields after each. What was judged before it fails stays."""
    known = _read(folder)
    with (folder / _VERDICTS).open("a", encoding="utf-8") as file:
        if file.tell():
            file.write("\n")  # a line that a crash cut off must not swallow the next
        for query, text in asked:
            key = _key(judge.model, query, text)
            if key not in known and (verdict := judge.verdict(query, text)) is not None:
                known[key] = verdict
                row = {"key": key, "judge": judge.model, "query": query.id, "yes": verdict.yes, "score": verdict.score}
                file.write(json.dumps(row) + "\n")
                file.flush()
            yield


def latest_judge(folder: Path) -> str | None:
    """The model of the latest verdict in a folder; None without any."""
    return next((row["judge"] for row in reversed(_rows(folder))), None)


def verdicts(folder: Path, model: str | None, asked: Iterable[tuple[Query, str]]) -> list[Verdict | None]:
    """What a judge has said of answers; None where it has said nothing yet."""
    known = _read(folder)
    return [known.get(_key(model, query, text)) if model else None for query, text in asked]


def _read(folder: Path) -> dict[str, Verdict]:
    return {row["key"]: Verdict(row["yes"], row["score"]) for row in _rows(folder)}


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / _VERDICTS
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            if {"key", "judge", "yes", "score"} <= row.keys():
                rows.append(row)
        except (ValueError, AttributeError):
            continue
    return rows


def _key(model: str, query: Query, text: str) -> str:
    """Of a verdict: the same answer to the same question is judged once, whoever gave it."""
    told = json.dumps([model, query.id, query.truth["question"], query.truth["answer"], text])
    return hashlib.sha256(told.encode()).hexdigest()[:24]
