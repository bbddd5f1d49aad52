"""EgoSchema: three minutes of a day through somebody's eyes, one question each, asked at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from millpond.errors import MillpondError
from millpond.eval.benchmarks.base import Annotations, Answered, Benchmark, Query, Score, accuracy
from millpond.eval.benchmarks.folder import Folder, Reader, as_object, index, load_json, load_rows, text
from millpond.eval.benchmarks.letters import lettered, named_choice

_OPTIONS = 5


class EgoSchema(Benchmark):
    """`questions.json`, and `subset_answers.json` with the 500 public answers: then those alone are asked. Without it all are, and
    `submission.json` holds what the authors' server takes."""

    name: ClassVar[str] = "egoschema"
    title: ClassVar[str] = "EgoSchema"
    source: ClassVar[str] = "egoschema/EgoSchema, README; lmms-eval, tasks/egoschema, for the words and the letters"

    def read(self, folder: Path) -> Annotations:
        files = Folder(folder)
        reader = Reader(files)
        path, known = files.one("questions.json"), files.named("subset_answers.json")
        answers = load_json(known[0]) if known else None
        if answers is not None and not isinstance(answers, dict):
            raise MillpondError("subset_answers.json must hold one object: a number of an option for each q_uid")
        for place, row in enumerate(load_rows(path)):
            with reader.row(path, place):
                fields = as_object(row)
                name = text(fields, "q_uid")
                if answers is not None and name not in answers:
                    continue
                options = [text(fields, f"option {number}") for number in range(_OPTIONS)]
                truth: dict[str, Any] = {"options": options}
                if answers is not None:
                    truth["answer"] = index(answers, name, _OPTIONS)
                lines = [text(fields, "question"), *lettered(options, "{}. {}")]
                prompt = "\n".join([*lines, "Answer with the option's letter from the given choices directly."])
                reader.add(name, Query(name, prompt, "all", truth=truth))
        return reader.done()

    def score(self, answered: Sequence[Answered]) -> Score:
        known = [one for one in answered if "answer" in one.query.truth]
        if not known:
            return Score(
                None,
                {},
                0,
                "without subset_answers.json there are no answers: send submission.json to the authors' server",
            )
        chosen = [(one.query, *_chosen(one)) for one in known]
        part = accuracy([choice == query.truth["answer"] for query, choice, _ in chosen])
        return Score(part.value, {}, sum(not found for _, _, found in chosen))

    def submission(self, answered: Sequence[Answered]) -> dict[str, int] | None:
        if all("answer" in one.query.truth for one in answered):
            return None
        return {one.query.id: ord(_chosen(one)[0]) - ord("A") for one in answered}


def _chosen(one: Answered) -> tuple[str, bool]:
    return named_choice(one.text, one.query.id, one.query.truth["options"])
