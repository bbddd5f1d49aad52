"""`bench/published_answers.py` on a folder of the shape that OVO-Bench publishes, with a scorer in the place of theirs."""

import json
import subprocess
import sys
from pathlib import Path

from tests.bench.test_benches import BENCH


def test_published_answers(tmp_path: Path) -> None:
    moments = [{"realtime": 3, "count": 2, "response": "2"}, {"realtime": 5, "count": 3, "response": None}]
    held = {
        "backward": [{"id": 0, "task": "EPM", "response": ["A. x"], "ground_truth": "A"}],
        "realtime": [{"id": 1, "task": "OCR", "response": "C", "ground_truth": "B"}],
        "forward": [{"id": 2, "task": "REC", "test_info": moments}],
    }
    (tmp_path / "results" / "Model").mkdir(parents=True)
    (tmp_path / "results" / "Model" / "Model_offline.json").write_text(json.dumps(held))
    (tmp_path / "score.py").write_text("print('Task: EPM, Acc: 100.00\\nTask: REC, Acc: 51.00\\nTotal Avg.: 50.00')")
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCH / "published_answers.py"), str(tmp_path), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    row = json.loads(out.read_text())["models"]["Model"]
    assert row["answers"] == 4
    assert row["ours"]["total"] == 50.0
    assert row["ours"]["REC"] == 50.0
    assert row["theirs"] == {"EPM": 100.0, "REC": 51.0, "total": 50.0}
    assert row["farthest_apart"] == 1.0
