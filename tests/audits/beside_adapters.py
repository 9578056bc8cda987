"""Audit a plain script on each stack that has an adapter, and write down whether adapter and audit agree.

``python -m tests.audits.beside_adapters --write reports/audit/stacks.json`` takes seconds for each script. Rows of
stacks that are not installed stay as they are in the file: one file holds what several environments found.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.report.result import Report, read_report
from conformance.report.trend import release_order
from conformance.subjects.checkout import commit
from tests.audits.runner import audit
from tests.audits.score import brief

FOLDER, REPORTS = Path(__file__).parent, Path(__file__).parents[2] / "reports"


@dataclass(frozen=True)
class Stack:
    """A script, and the report of the adapter of the same stack."""

    name: str
    package: str
    """That must be installed; of a stack that no package index has, the environment variable with its checkout."""
    script: str
    """Below tests/audits."""
    report: str
    """Pattern of the file's name below reports/conformance; the latest release counts."""
    ranks: int = 1


STACKS = [
    Stack("Lightning Trainer", "lightning", "stacks/lightning_masked.py", "lightning-trainer-*-cpu.json"),
    Stack("accelerate", "accelerate", "scripts/accelerate_args.py", "accelerate-*-cpu.json"),
    Stack("TRL SFTTrainer", "trl", "scripts/trl_sft.py", "trl-*-cpu.json"),
    Stack("transformers Trainer", "transformers", "scripts/hf_trainer.py", "transformers-[0-9]*-cpu.json"),
    Stack("LitGPT", "litgpt", "stacks/litgpt_pretrain.py", "litgpt-0*-cpu.json"),
    Stack("x-transformers", "x_transformers", "stacks/x_transformers_loop.py", "x-transformers-*-cpu.json"),
    Stack("nanoGPT", "NANOGPT", "stacks/nanogpt_train.py", "nanogpt-*-cpu.json"),
    Stack("nanochat", "NANOCHAT", "stacks/nanochat_base_train.py", "nanochat-*-cpu.json"),
]
"""Add a stack here: a script of 20 to 60 lines that trains in seconds, with the defaults that its users have."""
SAME = {
    "ACC-2": ["mean-of-means"],
    "ACC-4": ["uneven-targets"],
    "ACC-5": ["loss-scale", "ignored-counted", "first-counted"],
    "CLIP-1": ["clipping"],
    "DECAY-4": ["decay-of-vectors", "expect-no-decay"],
    "DIST-4": ["same-masks"],
    "INIT-2": ["default-init", "first-loss"],
    "LR-3": ["first-rate-0"],
    "OPT-13": ["resume-optimizer", "resumed-optimizer"],
    "PREC-6": ["lost-to-rounding", "sixteen-bit-weights"],
    "REPORT-1": ["told-loss", "first-counted"],
    "RESUME-1": ["resume-generator", "resumed-weights"],
    "RESUME-2": ["resumed-data"],
    "RESUME-11": ["resume-optimizer", "resumed-optimizer"],
    "TIE-1": ["ties-apart"],
}
"""Which rules of the audit look at what a clause looks at, in one run. What is not here takes runs of its own."""


def fails(report: Report) -> list[str]:
    """Return the clauses that a report says were failed, those that are declared as deviations among them."""
    return [identity for identity, verdict in report.verdicts.items() if verdict.outcome in ("fail", "deviates")]


def compared(clause: str, findings: dict[str, str]) -> str:
    """Return what the audit says of a fault that the adapter showed: named, ok, not looked at, no such rule."""
    rules = SAME.get(clause)
    if rules is None:
        return "no such rule"
    outcomes = [findings[rule] for rule in rules if rule in findings]
    if {"fault", "advice"} & set(outcomes):
        return "named"
    return "ok" if "ok" in outcomes else "not looked at"


def installed(stack: Stack) -> bool:
    """Return True if a stack can be audited here."""
    if stack.package.isupper():
        return stack.package in os.environ
    return importlib.util.find_spec(stack.package) is not None


def version(stack: Stack) -> str:
    """Return the release of a stack, or the commit of its checkout."""
    if stack.package.isupper():
        return commit(Path(os.environ[stack.package]))
    return importlib.metadata.version(stack.package)


def row(stack: Stack) -> dict[str, Any]:
    """Audit the script of a stack, and return what both say."""
    script = FOLDER / stack.script
    found = audit(script.read_text(encoding="utf-8"), script.stem, ranks=stack.ranks)
    if not found.findings:
        raise SystemExit(f"{stack.script} was not audited:\n{found.output[-2000:]}")
    findings = {finding["rule"]: finding["outcome"] for finding in found.findings}
    reports = map(read_report, (REPORTS / "conformance").glob(stack.report))
    failed = fails(max(reports, key=lambda report: release_order(report.version)))
    by_clause = {clause: compared(clause, findings) for clause in failed}
    shared = {rule for clause, said in by_clause.items() if said == "named" for rule in SAME[clause]}
    said = [brief(finding) for finding in found.found("fault", "advice")]
    return {
        "stack": stack.name,
        "version": version(stack),
        "script": f"tests/audits/{stack.script}",
        "adapter_fails": by_clause,
        "audit_says": said,
        "only_the_audit": [finding["rule"] for finding in said if finding["rule"] not in shared],
        "looked_at": sum(outcome != "not looked at" for outcome in findings.values()),
    }


def main() -> int:
    """Audit what is installed, print it, and write it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="file for the record; rows of other stacks in it are kept")
    parser.add_argument("--only", default="", help="part of a stack's name")
    options = parser.parse_args()
    chosen = [stack for stack in STACKS if options.only.lower() in stack.name.lower()]
    found = {stack.name: row(stack) for stack in chosen if installed(stack)}
    print(json.dumps(list(found.values()), indent=1))
    print(f"not installed: {[stack.name for stack in chosen if stack.name not in found]}", file=sys.stderr)
    if options.write:
        kept = json.loads(options.write.read_text(encoding="utf-8"))["stacks"] if options.write.exists() else []
        known = {entry["stack"]: entry for entry in kept} | found
        rows = [known[stack.name] for stack in STACKS if stack.name in known]
        record = {"schema": 1, "kind": "audit-stacks", "stacks": rows}
        options.write.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
