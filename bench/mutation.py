"""Which lines no test guards: a random sample of mutants of the cache, memory, policies and positions, and the tests that reach each.

    OMP_NUM_THREADS=1 python bench/mutation.py --seed 2 --size 200 --out bench/results/mutation.json

Needs `cosmic-ray` and `coverage` beside the `dev` extra (`make mutation` sets them up). The operators are cosmic-ray's and two more
(mutation_sites.py); a place is drawn first, then one of the changes possible there, and every file has its share of all places. Nothing is
written to `src`: the changed source is imported in a fork of a process that has torch already, which cosmic-ray's own worker cannot do.

A mutant runs the tests that reach its lines, up to the first that fails: the quickest, and where it survives those, the next ones. It is killed
by a test that fails, by an import that does, or by running for too long. One that no test reaches has survived. Tests marked slow or
nightly, and those of other folders, are not asked and could kill a few more.

Survivors that no test could tell from the program are listed in `mutation_equivalent.json` with the reason, by file and changed line. They
leave the score: score = killed / (mutants - equivalent), with Wilson's 95 % interval. Any other survivor counts as alive.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any

from mutation_sites import Mutant, draw
from mutation_tests import Outcome, Reach, preload, run, watch

ROOT = Path(__file__).parents[1]
ROOMS = ("cache", "memory", "policies", "positions")
TESTS = ("cache", "memory", "ops", "policies", "positions", "session")
MARKS = "not slow and not nightly"
EQUIVALENT = Path(__file__).with_name("mutation_equivalent.json")


def reached(paths: list[str], stored: Path | None) -> Reach:
    """Which tests reach which lines; of a stored answer what is older than a file of tests is asked again, all when the code is younger."""
    files = sorted(str(path.relative_to(ROOT)) for room in TESTS for path in (ROOT / "tests" / room).rglob("test_*.py"))
    known, age = None, 0.0
    if stored is not None and stored.exists():
        age = stored.stat().st_mtime
        if all((ROOT / path).stat().st_mtime < age for path in paths):
            known = Reach.read(stored)
    new = [file for file in files if known is None or (ROOT / file).stat().st_mtime > age]
    if known is None or new:
        fresh = watch(ROOT, paths, new, MARKS)
        known = fresh if known is None else known.without({*new}).beside(fresh)
        if stored is not None:
            known.write(stored)
    return known


def selected(reach: Reach, tests: set[str], seconds: float) -> list[str]:
    """The quickest of some tests, as many as take so many seconds, file by file in the order of their mean."""
    taken: list[str] = []
    spent = 0.0
    for test in sorted(tests, key=lambda test: (reach.tests[test], test)):
        if spent + reach.tests[test] <= seconds:
            taken.append(test)
            spent += reach.tests[test]
    files: dict[str, list[float]] = {}
    for test in taken:
        files.setdefault(test.split("::")[0], []).append(reach.tests[test])
    return sorted(taken, key=lambda test: (fmean(files[test.split("::")[0]]), test.split("::")[0]))


def tried(mutants: list[Mutant], reach: Reach, seconds: tuple[float, float]) -> Iterator[dict[str, Any]]:
    """How each mutant fared."""
    for mutant in mutants:
        reaching = reach.of(mutant.path, *mutant.lines)
        left, spent, outcome = set(reaching), 0.0, Outcome("unreached")
        for most in seconds:
            tests = selected(reach, left, most)
            if not tests:
                break
            limit = 20 + 3 * sum(reach.tests[test] for test in tests)
            outcome = run(tests, limit, ROOT / mutant.path, mutant.source(ROOT))
            left -= {*tests}
            spent += outcome.seconds
            if outcome.how != "passed":
                break
        yield {
            **asdict(mutant),
            "killed": outcome.how not in ("passed", "unreached"),
            "how": outcome.how,
            "test": outcome.test,
            "tests": len(reaching) - len(left),
            "cut": bool(left),
            "seconds": round(spent, 2),
        }


def score(killed: int, counted: int) -> dict[str, Any]:
    """A share with its interval at 95 %."""
    from millpond.eval.accuracy.intervals import wilson  # not before the forks, which import the package themselves

    found = wilson(killed, counted)
    return {"killed": killed, "counted": counted, "share": found.share, "interval": [found.low, found.high]}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by file, the survivors, and those among them that are equivalent, with the reason."""
    reasons = {(path, one["before"], one["after"]): one["why"] for path, all_ in _equivalent().items() for one in all_}
    files: dict[str, Counter[str]] = {}
    survivors, equivalent = [], []
    for one in sorted(found, key=lambda one: (one["path"], one["lines"])):
        why = None if one["killed"] else reasons.get((one["path"], one["before"], one["after"]))
        files.setdefault(one["path"], Counter())[
            "killed" if one["killed"] else "equivalent" if why else "survived"
        ] += 1
        if not one["killed"]:
            brief = {name: one[name] for name in ("path", "lines", "operator", "before", "after", "tests", "cut")}
            (equivalent if why else survivors).append({**brief, "why": why} if why else brief)
    killed = sum(one["killed"] for one in found)
    return {
        "score": score(killed, len(found) - len(equivalent)),
        "score_with_equivalent_as_alive": score(killed, len(found)),
        "killed_by": dict(Counter(one["how"] for one in found if one["killed"])),
        "files": {path: dict(counts) for path, counts in files.items()},
        "survivors": survivors,
        "equivalent": equivalent,
    }


def _equivalent() -> dict[str, list[dict[str, str]]]:
    known: dict[str, list[dict[str, str]]] = json.loads(EQUIVALENT.read_text())
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", type=int, default=300)
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="of tests' processor time, for the quickest that reach a mutant"
    )
    parser.add_argument(
        "--more", type=float, default=12.0, help="as much again for the next ones, where it survives those"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no mutant later; they are in random order"
    )
    parser.add_argument("--only", default="", help="mutate only files whose path contains this")
    parser.add_argument(
        "--reach", type=Path, help="which tests reach which lines: read from here if it is there, else written here"
    )
    parser.add_argument("--log", type=Path, help="a line of JSON for each mutant, as it ends")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    paths = sorted(
        str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / "src" / "millpond" / room).rglob("*.py")
    )
    preload()
    reach = reached(paths, options.reach)
    mutants = draw(ROOT, [path for path in paths if options.only in path], options.size, options.seed)
    found, end = [], monotonic() + 60 * options.minutes
    for one in tried(mutants, reach, (options.seconds, options.more)):
        found.append(one)
        line = f"{len(found)}/{len(mutants)} {one['path']}:{one['lines'][0]} {one['how']} {one['seconds']} s"
        print(line, file=sys.stderr, flush=True)
        if options.log:
            with options.log.open("a") as log:
                log.write(json.dumps(one) + "\n")
        if monotonic() > end:
            break
    from millpond.eval.hardware import describe

    result = {
        "what": "mutants of cache, memory, policies and positions that a test kills",
        "command": "OMP_NUM_THREADS=1 python bench/mutation.py " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "tool": {name: version(name) for name in ("cosmic-ray", "coverage", "pytest")},
        "machine": describe(),
        "noise": "a shared machine with other jobs running; times are of the processor",
        "seed": options.seed,
        "drawn": len(mutants),
        "mutants": len(found),
        "places": "drawn first, each file its share; then one change there",
        "tests": {
            "run": len(reach.tests),
            "left_out_because_they_fail_unmutated": reach.failed,
            "marks": MARKS,
            "seconds_a_mutant": [options.seconds, options.more],
        },
        "aim": {"share": ">= 0.85"},
        **summary(found),
        "seconds": round(sum(one["seconds"] for one in found)),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
