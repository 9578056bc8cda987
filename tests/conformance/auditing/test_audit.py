"""The audit of a script, from the command line and in a block of code."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import conformance
from conformance.cli import main
from conformance.errors import UsageError
from conformance.recording.snapshot import find_logits
from tests.conformance.auditing.loop import SCRIPT

Audit = Callable[..., tuple[int, str, str]]


@pytest.fixture
def audit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Audit:
    """Audit a script, with parts of it replaced; return the exit code, its stdout and the letter."""

    def run(*options: str, script: str = SCRIPT, **replaced: str) -> tuple[int, str, str]:
        for old, new in CHANGES.items():
            if old in replaced:
                assert new in script
                script = script.replace(new, replaced[old])
        path = tmp_path / "train.py"
        path.write_text(script, encoding="utf-8")
        code = main(["audit", *options, "--", str(path), "--its-own", "x"])
        output = capfd.readouterr()
        return code, output.out, output.err

    return run


CHANGES = {"loss": "(loss / 2).backward()", "zero": "    optimizer.zero_grad()\n", "end": 'print("done")\n'}


def test_a_healthy_script_has_no_fault(audit: Audit) -> None:
    code, out, letter = audit()
    assert code == 0
    assert "0 fault" not in letter
    assert "fault" not in letter.splitlines()[-1]
    assert numbered(out) == list(enumerate(out.splitlines()))  # nothing but the script's own lines
    assert len(numbered(out)) == 4  # the run ends when the fifth update begins
    assert "✓told-loss" in letter


def numbered(out: str) -> list[tuple[int, str]]:
    """Lines of updates, with their numbers."""
    return list(enumerate(line for line in out.splitlines() if line.startswith("step")))


def test_a_fault_is_named_and_makes_the_exit_code_1(audit: Audit) -> None:
    code, _, letter = audit(zero="")
    assert code == 1
    assert "FAULT leftover-gradient" in letter
    assert "zero_grad" in letter


def test_a_fault_that_is_allowed_is_none(audit: Audit) -> None:
    code, _, letter = audit("--allow", "leftover-gradient=meant", zero="")
    assert code == 0
    assert "ALLOWED leftover-gradient" in letter
    assert "meant" in letter


def test_the_run_goes_on_if_it_is_asked_to(audit: Audit) -> None:
    code, out, letter = audit("--then", "go-on", "--updates", "2")
    assert code == 0
    assert out.splitlines()[-1] == "done"
    assert "Audit of 2 updates" in letter
    assert len(numbered(out)) == 6


def test_nothing_is_left_in_the_run(audit: Audit) -> None:
    before = global_state()
    end = "print(torch.overrides._len_torch_function_stack(), len(nn.modules.module._global_forward_hooks))\n"
    _, out, _ = audit("--then", "go-on", "--updates", "2", end=end)
    assert out.splitlines()[-1] == "0 0"
    assert global_state() == before


def global_state() -> tuple[object, ...]:
    """What an audit changes while it runs."""
    module = torch.nn.modules.module
    return (
        len(module._global_forward_hooks),
        len(module._global_forward_pre_hooks),
        torch.overrides._len_torch_function_stack(),  # type: ignore[attr-defined] # torch's own
        torch.autograd.backward,
        torch.nn.utils.clip_grad_norm_,
        torch.compile,
        torch.optim.Optimizer.__init__,
        sys.stdout,
        sys.argv[:],
    )


KEYWORDS = {  # calls as a script may write them, each of a function that the audit watches
    "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)": (
        "torch.nn.utils.clip_grad_norm_(parameters=model.parameters(), max_norm=1.0)",
        "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=torch.tensor(1.0))",
        "torch.nn.utils.clip_grad_value_(parameters=model.parameters(), clip_value=1e3)",
        "torch.nn.utils.clip_grad_norm_(next(model.parameters()), max_norm=1e3)",
    ),
    "(loss / 2).backward()": (
        "torch.autograd.backward(tensors=loss / 2)",
        "torch.autograd.backward(tensors=[loss / 2])",
        "torch.autograd.backward(part / 2 for part in [loss])",
        "for p, g in zip(model.parameters(), torch.autograd.grad(outputs=loss / 2, inputs=list(model.parameters()))):"
        " p.grad = g if p.grad is None else p.grad + g",
    ),
    "torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)": (
        "torch.optim.AdamW(params=model.parameters(), lr=1e-3, weight_decay=0.0)",
        "torch.optim.AdamW(lr=1e-3, weight_decay=0.0, params=list(model.parameters()))",
    ),
}


@pytest.mark.parametrize(("old", "new"), [(old, new) for old, calls in KEYWORDS.items() for new in calls])
def test_a_script_may_name_the_arguments_of_any_function_that_is_watched(audit: Audit, old: str, new: str) -> None:
    assert old in SCRIPT
    code, out, letter = audit(script=SCRIPT.replace(old, new))
    assert code == 0, letter
    assert len(numbered(out)) == 4
    assert "FAULT" not in letter


def test_a_pass_on_the_meta_device_is_not_an_update(audit: Audit) -> None:
    """LitGPT counts its FLOPs with a model of the same shape on the meta device, forward and backward."""
    counted = """with torch.device("meta"):
    shape = GPT()
    ids = torch.zeros(B, T, dtype=torch.long)
    shape(ids, ids)[1].backward()
optimizer = """
    code, out, letter = audit(script=SCRIPT.replace("optimizer = ", counted))
    assert code == 0, letter
    assert len(numbered(out)) == 4
    assert "FAULT" not in letter


def test_a_wrong_call_of_a_watched_function_fails_as_without_the_audit(audit: Audit) -> None:
    old = "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)"
    code, _, letter = audit(script=SCRIPT.replace(old, "torch.nn.utils.clip_grad_norm_(model.parameters())"))
    assert code == 1
    assert "missing 1 required positional argument: 'max_norm'" in letter


def test_the_script_sees_its_own_arguments(audit: Audit) -> None:
    _, out, _ = audit(script="import sys\nprint(__name__, sys.argv[1:])\n" + SCRIPT)
    assert out.splitlines()[0] == "__main__ ['--its-own', 'x']"


@pytest.mark.parametrize(("end", "code"), [("raise SystemExit(7)", 7), ("raise ValueError('of its own')", 1)])
def test_the_exit_code_is_the_scripts_if_it_fails(audit: Audit, end: str, code: int) -> None:
    found, _, letter = audit("--updates", "1", "--then", "go-on", end=end + "\n")
    assert found == code
    if code == 1:
        assert "ValueError: of its own" in letter
        assert "runpy" not in letter


def test_a_script_that_trains_nothing_is_told_so(audit: Audit) -> None:
    code, out, letter = audit(script="print('hello')\n")
    assert (code, out) == (2, "hello\n")
    assert "saw no update" in letter


def test_the_report_is_json(audit: Audit, tmp_path: Path) -> None:
    audit("--report", str(tmp_path / "audit.json"), zero="")
    found = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert found["schema"] == 1
    assert found["updates"] == 4
    assert [entry["rule"] for entry in found["findings"] if entry["outcome"] == "fault"] == ["leftover-gradient"]
    assert found["summary"]["fault"] == 1


def test_annotations_name_rule_and_remedy(audit: Audit) -> None:
    _, _, letter = audit("--format", "github", zero="")
    assert "::error title=leftover-gradient fault::" in letter


@pytest.mark.parametrize(
    ("expect", "fault"),
    [
        ("lr=1e-3,clip=1.0,tied,fresh,seed=0", None),
        ("lr=3e-4", "expect-lr"),
        ("clip=0.1", "expect-clip"),
        ("seed=1", "expect-seed"),
        ("no-weight-decay=norm", None),
    ],
)
def test_what_is_expected_is_judged(audit: Audit, expect: str, fault: str | None) -> None:
    code, _, letter = audit("--expect", expect)
    assert code == (0 if fault is None else 1), letter
    assert fault is None or f"FAULT {fault}" in letter


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["audit"], "no script to audit"),
        (["audit", "--", "nowhere.py"], "no such script"),
        (["audit", "--", "-m", "no.such.module"], "no module named"),
        (["audit", "--updates", "0", "--", __file__], "whole number"),
        (["audit", "--expect", "size=3", "--", __file__], "knows no 'size'"),
        (["audit", "--expect", "clip=2,tied,size", "--", __file__], "knows no 'size'"),
        (["audit", "--expect", "lr=fast", "--", __file__], "needs a number"),
        (["audit", "--allow", "nothing=x", "--", __file__], "unknown rule"),
        (["audit", "--allow", "shift", "--", __file__], "needs a reason"),
        (["audit", "--report", "/nowhere/x.json", "--", __file__], "cannot be written"),
        (["audit", "--", "python", "train.py"], "leave python out"),
    ],
)
def test_a_mistake_of_the_users_is_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert words in message.lower()
    assert "Traceback" not in message


def small_loop(updates: int, model: nn.Module, seen: list[int]) -> None:
    """Train a model on ids, with AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for update in range(updates):
        ids = torch.randint(16, (4, 9))
        logits = model(ids[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(update)


def bigram() -> nn.Module:
    """Return the smallest model of next tokens."""
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def test_a_block_of_code_is_audited_and_ended() -> None:
    seen: list[int] = []
    with conformance.audit(updates=2) as verdict:
        small_loop(5, bigram(), seen)
    assert seen == [0, 1]
    assert not verdict.faults
    assert [finding.rule for finding in verdict.advice] == ["context-unused"]  # a bigram has no context
    assert "Audit of 2 updates" in str(verdict)


def test_a_block_of_code_may_go_on() -> None:
    seen: list[int] = []
    with conformance.audit(updates=2, then="go-on") as verdict:
        small_loop(5, bigram(), seen)
    assert seen == [0, 1, 2, 3, 4]
    assert verdict.facts is not None
    assert len(verdict.facts.updates) == 2


def test_an_audit_of_no_update_is_refused() -> None:
    with pytest.raises(UsageError, match="one update or more"):
        conformance.audit(updates=0)


def test_an_error_of_the_blocks_own_is_raised() -> None:
    with pytest.raises(ZeroDivisionError), conformance.audit():
        raise ZeroDivisionError


def test_the_audit_changes_no_number_of_the_run() -> None:
    def weights(audited: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model = bigram()
        if audited:
            with conformance.audit(updates=2, then="go-on"):
                small_loop(5, model, [])
        else:
            small_loop(5, model, [])
        return [parameter.detach().clone() for parameter in model.parameters()]

    assert all(torch.equal(*pair) for pair in zip(weights(True), weights(False), strict=True))


@pytest.mark.parametrize("early", [False, True])
def test_compiled_code_is_compiled_once(early: bool) -> None:
    import torch._dynamo.utils as dynamo

    torch._dynamo.reset()
    model = bigram()
    compiled = torch.compile(model, backend="eager") if early else model
    if early:
        small_loop(1, compiled, [])  # type: ignore[arg-type] # it is called like a module
    before = dynamo.counters["stats"]["unique_graphs"]
    with conformance.audit(updates=2, then="go-on") as verdict:
        if not early:
            compiled = torch.compile(model, backend="eager")
        small_loop(5, compiled, [])  # type: ignore[arg-type] # as above
    assert dynamo.counters["stats"]["unique_graphs"] - before == (0 if early else 1)
    assert verdict.facts is not None
    assert verdict.facts.compiled
    assert not verdict.faults
    assert "shift" in [finding.rule for finding in verdict.of("ok")]  # seen by a forward of the audit's own


def test_of_a_loss_in_many_chunks_the_first_are_looked_at(audit: Audit) -> None:
    """LitGPT computes a thousand cross entropies in an update: figures of each would double its time."""
    old = "F.cross_entropy(logits.view(-1, V), targets.reshape(-1))"
    new = "sum(F.cross_entropy(a, b, reduction='sum') for a, b in zip(logits.view(-1, V).split(4), " + (
        "targets.reshape(-1).split(4))) / targets.numel()"
    )
    code, _, letter = audit(script=SCRIPT.replace(old, new))
    assert code == 0, letter
    assert "✓loss-input" in letter
    code, _, letter = audit(script=SCRIPT.replace(old, new.replace("(a, b,", "(a.softmax(-1), b,")))
    assert code == 1
    assert "loss-input" in letter


def test_the_recording_holds_no_output_of_a_module(audit: Audit) -> None:
    """Held outputs of the first update took 15 GB with LitGPT at 124M."""
    old = "        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1)))\n"
    new = "        x = self.wte(ids)\n        refs.append(weakref.ref(x))\n" + old.replace("self.wte(ids)", "x")
    script = "import weakref\nrefs = []\n" + SCRIPT.replace(old, new)
    script = script.replace(
        "    optimizer.step()\n",
        "    del loss, _\n    print(sum(r() is not None for r in refs))\n" * 1 + ("    optimizer.step()\n"),
    )
    code, out, letter = audit(script=script)
    assert code == 0, letter
    assert [line for line in out.splitlines() if line.isdigit()] == ["0"] * 4


def test_logits_are_not_copied_to_be_found() -> None:
    logits = torch.zeros(2, 3, 4)
    assert find_logits((logits,)) is logits
    assert find_logits({"logits": logits, "loss": logits.sum()}) is logits
    assert find_logits([logits, logits], whole=False) is logits
    assert find_logits([logits, logits]) is not logits
