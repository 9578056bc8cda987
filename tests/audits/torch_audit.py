"""What torch-audit finds on the same scripts: its ``autopatch`` is put on the model and the optimizer of each.

``python -m tests.audits.torch_audit --write reports/audit/torch-audit.json``. A fault counts as found if torch-audit
gives any warning or error that it does not give on the honest script, whatever it says.
"""

import argparse
import contextlib
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.audits.runner import RANKS, missing, names, start
from tests.audits.score import faults, import_first, read


@contextlib.contextmanager
def watching(report: Path) -> Iterator[None]:
    """Put torch-audit on the first module that is called with gradients, and on an optimizer of it."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch_audit import autopatch

    auditors: list[Any] = []
    optimizers: list[torch.optim.Optimizer] = []
    original = torch.optim.Optimizer.__init__

    def made(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        optimizers.append(self)

    def called(module: torch.nn.Module, args: Any) -> None:
        own = {id(tensor) for tensor in module.parameters()}
        if auditors or not own or not optimizers or not torch.is_grad_enabled():
            return
        held = [any(id(t) in own for group in o.param_groups for t in group["params"]) for o in optimizers]
        chosen = next((o for o, fits in zip(optimizers, held, strict=True) if fits), optimizers[0])
        auditors.append(None)  # what it calls itself is not the run's
        auditors[0] = autopatch(module, optimizer=chosen, every_n_steps=1, reporters=[], suppress_internal_errors=True)

    torch.optim.Optimizer.__init__ = made  # type: ignore[method-assign] # of a process that ends with the script
    handle = register_module_forward_pre_hook(called)
    try:
        yield
    finally:
        handle.remove()
        found = auditors[0].findings if auditors and auditors[0] is not None else []
        rows = [{"rule": f.rule_id, "severity": str(f.severity.name), "message": f.message} for f in found]
        report.write_text(json.dumps({"watched": bool(auditors and auditors[0]), "findings": rows}), encoding="utf-8")


def found_in(
    text: str, script: str, arguments: tuple[str, ...], ranks: int, before: tuple[str, ...]
) -> set[str] | None:
    """Return the rules that torch-audit warns of; None if it could not be put on the run."""
    with tempfile.TemporaryDirectory(prefix="torch-audit-") as place:
        folder = Path(place).resolve()
        file = folder / f"{script}.py"
        file.write_text(text, encoding="utf-8")
        if before:
            start(folder, ranks, ["plain", str(file), *before])
        start(folder, ranks, ["torch-audit", str(file), *arguments])
        report = folder / "torch-audit-0.json"
        content: dict[str, Any] = {"watched": False}
        if report.exists():
            content = json.loads(report.read_text(encoding="utf-8"))
    if not content["watched"]:
        return None
    return {row["rule"] for row in content["findings"] if row["severity"] not in ("INFO", "DEBUG")}


def main() -> int:
    """Run all scripts, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True)
    options = parser.parse_args()
    import_first()
    scripts = [script for script in names() if not missing(script)]
    honest = {s: found_in(read(s), s, (), RANKS.get(s, 1), ()) for s in scripts}
    rows = []
    for fault in faults():
        if missing(fault.script):
            continue
        text = fault.planted(read(fault.script))
        found = found_in(text, fault.script, fault.arguments, fault.ranks, fault.before)
        new = sorted((found or set()) - (honest[fault.script] or set()))
        rows.append({"script": fault.script, "title": fault.title, "watched": found is not None, "found": new})
        print(f"{fault.id}: {'not watched' if found is None else new}", file=sys.stderr)
    record = {
        "schema": 1,
        "kind": "torch-audit-score",
        "version": importlib.metadata.version("torch-audit"),
        "honest": {script: sorted(found) if found is not None else None for script, found in honest.items()},
        "faults": rows,
    }
    options.write.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{sum(bool(row['found']) for row in rows)} of {len(rows)} found; warnings on honest scripts: {honest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
