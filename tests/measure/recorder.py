"""What the recorder costs: the same tiny run with and without it, in turn, as a ratio within one process.

``python -m tests.measure.recorder --write reports/recorder-overhead.json`` keeps the figures.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from conformance.recipe import Recipe
from conformance.recording import record
from conformance.recording.isolation import quiet_and_deterministic
from conformance.report.environment import environment
from conformance.subjects.reference import Reference

PAIRS = 40


def seconds(recorded: bool, recipe: Recipe) -> float:
    """Wall time of one run."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        if recorded:
            with record(Path(folder)):
                Reference().train(replace(recipe, directory=Path(folder)))
        else:
            with quiet_and_deterministic():  # the same threads, eager mode and filled memory: only the hooks differ
                Reference().train(replace(recipe, directory=Path(folder)))
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    recipe = Recipe(updates=4)
    for recorded in (True, False) * 3:
        seconds(recorded, recipe)  # imports and first calls
    pairs = [(seconds(True, recipe), seconds(False, recipe)) for _ in range(PAIRS)]
    ratios = sorted(with_recorder / without for with_recorder, without in pairs)
    result = {
        "what": "one run of four updates of the reference, 2 layers of width 32, with the recorder and without",
        "pairs": PAIRS,
        "ratio": {
            "median": round(statistics.median(ratios), 3),
            "5 %": round(ratios[PAIRS // 20], 3),
            "95 %": round(ratios[-1 - PAIRS // 20], 3),
        },
        "median_seconds_with": round(statistics.median(a for a, _ in pairs), 4),
        "median_seconds_without": round(statistics.median(b for _, b in pairs), 4),
        "environment": environment(),
    }
    text = json.dumps(result, indent=2) + "\n"
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
