"""The answers that OVO-Bench publishes with its program (`results/`), scored by millpond's rule and by theirs: the same figures.

    python bench/published_answers.py PATH/TO/OVO-Bench --out bench/results/published_answers.json

The folder is a checkout of JoeLeelyf/OVO-Bench; its `score.py` runs in a process of its own. Nothing of it is stored but the figures.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from millpond.eval.benchmarks import Answered, Query, get
from millpond.eval.hardware import describe


def answered(file: Path) -> list[Answered]:
    """One of their files: what a model was asked and said. A model that said nothing counts as wrong, as with the authors."""
    held = json.loads(file.read_text(encoding="utf-8"))
    found = []
    for row in [*held["backward"], *held["realtime"]]:
        found.append(one(str(row["id"]), row["task"], row["ground_truth"], row["response"]))
    for row in held["forward"]:
        for place, moment in enumerate(row["test_info"]):
            right = str(moment["count"]) if row["task"] == "REC" else ("Yes" if moment["type"] else "No")
            found.append(one(f"{row['id']}_{place}", row["task"], right, moment["response"]))
    return found


def one(id: str, task: str, answer: str, response: Any) -> Answered:
    text = response[0] if isinstance(response, list) else response
    return Answered(Query(id, "", task, truth={"answer": answer}), text or "")


_THEIR_NAMES = {
    "Backward Avg.": "backward",
    "Realtime Avg.": "real-time",
    "Forward Avg.": "forward",
    "Total Avg.": "total",
}


def theirs(folder: Path, model: str) -> dict[str, float]:
    """What their program prints; nothing behind the point where it fails (it cannot read answers that are lists)."""
    command = [sys.executable, "score.py", "--model", model, "--mode", "offline"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout
    found = {name: float(value) for name, value in re.findall(r"Task: (\w+), Acc: ([\d.]+)", said)}
    averages = {name: re.search(re.escape(name) + r": ([\d.]+)", said) for name in _THEIR_NAMES}
    return found | {_THEIR_NAMES[name]: float(match[1]) for name, match in averages.items() if match}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkout of JoeLeelyf/OVO-Bench")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = {}
    for model in sorted(path for path in (arguments.folder / "results").iterdir() if path.is_dir()):
        score = get("ovo-bench").score([each for file in sorted(model.glob("*.json")) for each in answered(file)])
        ours = {name: round(part.value, 2) for name, part in score.parts.items()}
        if score.total is not None:
            ours["total"] = round(score.total, 2)
        said = theirs(arguments.folder, model.name)
        apart = max((abs(ours[name] - value) for name, value in said.items()), default=None)
        answers = sum(part.questions for name, part in score.parts.items() if name.isupper())
        rows[model.name] = {"answers": answers, "ours": ours, "theirs": said, "farthest_apart": apart}
        print(f"{model.name}: {len(said)} figures of theirs, farthest apart {apart}")
    if arguments.out:
        command = "python bench/published_answers.py OVO-Bench --out bench/results/published_answers.json"
        result = {"command": command, "machine": describe(), "benchmark": "ovo-bench", "models": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
