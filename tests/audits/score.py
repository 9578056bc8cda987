"""Audit every honest script and every planted fault, and write down what was found and what was not.

``python -m tests.audits.score --write reports/audit/score.json`` takes some minutes on two cores; a script whose
package is not installed is skipped, and the file says so.
"""

import argparse
import importlib
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.audits.faults import Fault
from tests.audits.runner import NEEDS, RANKS, SCRIPTS, Audited, audit, missing, names

CHAPTERS = ("loss", "model", "optimizer", "ranks", "resume")


def faults() -> list[Fault]:
    """Return all planted faults."""
    return [f for chapter in CHAPTERS for f in importlib.import_module(f"tests.audits.faults.{chapter}").FAULTS]


def brief(finding: dict[str, Any]) -> dict[str, str]:
    """Return what a reader wants of a finding."""
    return {key: finding[key] for key in ("rule", "outcome", "seen")}


def read(script: str) -> str:
    """Return the text of an honest script."""
    return (SCRIPTS / f"{script}.py").read_text(encoding="utf-8")


def audit_honest(script: str, resumed: bool = False) -> Audited:
    """Audit an honest script, or its resume."""
    given: dict[str, Any] = {"arguments": ("--resume", "ckpt.pt"), "before": ("--steps", "3")} if resumed else {}
    return audit(read(script), script, ranks=RANKS.get(script, 1), **given)


def audit_fault(fault: Fault) -> Audited:
    """Audit a script with a fault in it."""
    text = fault.planted(read(fault.script))
    return audit(
        text, fault.script, fault.arguments, fault.ranks, fault.updates, fault.before,
        text if fault.broken_before else read(fault.script), fault.both_watched,
    )  # fmt: skip


def new_findings(found: Audited, honest: Audited) -> list[dict[str, Any]]:
    """Return the faults and advice that the honest script does not have at the same level."""
    known = {(finding["rule"], finding["outcome"]) for finding in honest.findings}
    return [f for f in found.found("fault", "advice") if (f["rule"], f["outcome"]) not in known]


def names_the(fault: Fault, finding: dict[str, Any]) -> bool:
    """Return True if a finding names a fault: its words are in what the letter says of it."""
    said = " ".join(finding[key] for key in ("rule", "requirement", "expected", "seen"))
    return re.search(fault.words, said, re.IGNORECASE) is not None


def verdict_on(fault: Fault, found: Audited, honest: Audited) -> dict[str, Any]:
    """Return the row of a fault: as what it was named, by which findings, and what else was said."""
    new = new_findings(found, honest)
    names_it = [finding for finding in new if names_the(fault, finding)]
    outcome = next((level for level in ("fault", "advice") if level in {f["outcome"] for f in names_it}), "missed")
    if not found.findings:
        outcome = "broken"
    row: dict[str, Any] = {"script": fault.script, "title": fault.title, "source": fault.source}
    row |= {
        "processes": fault.ranks,
        "resumed": bool(fault.arguments),
        "outcome": outcome,
        "named_by": [brief(f) for f in names_it],
    }
    row["also_said"] = [brief(f) for f in new if f not in names_it]
    if outcome == "broken":
        row["output"] = found.output[-1500:]
    return row


def score(only: str) -> dict[str, Any]:
    """Run all that matches ``only`` and return the record."""
    began, chosen = time.perf_counter(), [f for f in faults() if re.search(only, f.id)]
    scripts = [s for s in names() if any(f.script == s for f in chosen) or re.search(only, s)]
    honest: dict[tuple[str, bool], Audited] = {}
    record: dict[str, Any] = {"schema": 1, "kind": "audit-score", "honest": [], "faults": [], "skipped": []}
    for script in scripts:
        if missing(script):
            record["skipped"].append({"script": script, "reason": missing(script)})
            continue
        for resumed in (False, True) if script == "resumable" else (False,):
            found = honest[script, resumed] = audit_honest(script, resumed)
            row: dict[str, Any] = {"script": script, "resumed": resumed}
            row["findings"] = [brief(f) for f in found.found("fault", "advice")]
            if not found.findings:
                row["output"] = found.output[-1500:]
            row["not_looked_at"] = sorted(f["rule"] for f in found.found("not looked at"))
            record["honest"].append(row)
            said = [f"{finding['rule']} {finding['outcome']}" for finding in row["findings"]]
            print(f"honest {script}: {said or 'nothing'}", file=sys.stderr)
    for fault in chosen:
        if missing(fault.script):
            continue
        row = verdict_on(fault, audit_fault(fault), honest[fault.script, bool(fault.arguments)])
        record["faults"].append(row)
        rules, others = ([finding["rule"] for finding in row[key]] for key in ("named_by", "also_said"))
        print(f"{row['outcome']:7} {fault.id}: {rules} / {others}", file=sys.stderr)
    record["summary"] = summary(record)
    record["seconds"] = round(time.perf_counter() - began)
    return record


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Return the figures: how many faults were named, and what was said of honest scripts."""
    outcomes = Counter(row["outcome"] for row in record["faults"])
    total = len(record["faults"])
    named = outcomes["fault"] + outcomes["advice"]
    said = Counter(finding["outcome"] for row in record["honest"] for finding in row["findings"])
    return {
        "faults": total,
        "as_fault": outcomes["fault"],
        "as_advice": outcomes["advice"],
        "missed": outcomes["missed"],
        "broken": outcomes["broken"],
        "named_percent": round(100 * named / total, 1) if total else 0.0,
        "as_fault_percent": round(100 * outcomes["fault"] / total, 1) if total else 0.0,
        "honest_runs": len(record["honest"]),
        "faults_on_honest": said["fault"],
        "advice_on_honest": said["advice"],
    }


def main() -> int:
    """Run, print the figures, and write the record where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="file for the record")
    parser.add_argument("--only", default="", help="regular expression on 'script: title'")
    options = parser.parse_args()
    import_first()
    record = score(options.only)
    print(json.dumps(record["summary"], indent=2))
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def import_first() -> None:
    """Import what the scripts will: the forked processes then have it already."""
    for package in sorted(set(NEEDS.values())):
        if package != "trl" and not missing(next(s for s, p in NEEDS.items() if p == package)):
            importlib.import_module(package)


if __name__ == "__main__":
    sys.exit(main())
