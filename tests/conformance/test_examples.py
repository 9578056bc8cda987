"""The examples and the adapter of x-transformers: they stay small, run as they stand, and claim what is true."""

from pathlib import Path
from statistics import mean

import pytest
import torch

from conformance import OptimizerChoice, Recipe, record
from conformance.clause import catalogue, find_clauses
from conformance.loading import load_subject
from conformance.session import Session
from conformance.subject import Subject
from examples import train_gpt, train_x_transformers
from reference.data.documents import standard_library
from tests.audits.runner import audit

ROOT = Path(__file__).parents[2]
LIMITS = {
    "examples/globals_script.py": 110,
    "examples/globals_adapter.py": 70,
    "examples/plain_loop.py": 60,
    "examples/plain_loop_adapter.py": 40,
    "conformance/subjects/x_transformers.py": 80,
}
SPECIAL = {  # all that is no matrix multiplying activations, in a model of one layer
    "gpt": {
        "memory_tokens", "token_emb.emb.weight", "pos_emb.emb.weight", "post_emb_norm.gamma",
        "attn_layers.layers.0.0.0.g", "attn_layers.layers.0.1.mem_k", "attn_layers.layers.0.1.mem_v",
        "attn_layers.layers.1.0.0.g", "attn_layers.layers.1.1.ff.0.0.bias", "attn_layers.layers.1.1.ff.2.bias",
        "attn_layers.final_norm.g",
    },
    "llama": {
        "memory_tokens", "token_emb.emb.weight",
        "attn_layers.layers.0.0.0.g", "attn_layers.layers.0.1.mem_k", "attn_layers.layers.0.1.mem_v",
        "attn_layers.layers.1.0.0.g", "attn_layers.layers.1.1.ff.0.proj.bias", "attn_layers.final_norm.g",
    },
}  # fmt: skip


def x_transformers() -> Subject:
    pytest.importorskip("x_transformers", reason="x-transformers is not installed: pip install x-transformers")
    return load_subject("x-transformers")


def failures(subject: Subject, inapplicable: frozenset[str] = frozenset()) -> dict[str, str]:
    """What did not pass, by clause. Not applicable is only what lacks a capability, or is named as such."""
    with Session(subject) as session:
        results = {key: session.judge(clause) for key, clause in catalogue().items()}
    lacking = {key for key, clause in catalogue().items() if set(clause.needs) & set(subject.lacks)}
    assert {key for key, result in results.items() if result.outcome == "n/a"} <= lacking | inapplicable
    return {key: result.outcome for key, result in results.items() if result.outcome not in ("pass", "n/a")}


@pytest.mark.parametrize("file", LIMITS)
def test_it_stays_small(file: str) -> None:
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= LIMITS[file]


def test_the_plain_loop_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.plain_loop import main

    losses = main(steps=60, file=tmp_path / "model.pt")
    assert losses[0] > 5.0, "a model over 256 bytes that knows nothing loses ln 256 = 5.55 nats, and more"
    assert mean(losses[-10:]) < 3.0
    assert capsys.readouterr().out.count("loss") == 2
    assert torch.load(tmp_path / "model.pt")["head.weight"].shape == (256, 64)


def test_the_plain_loop_is_judged() -> None:
    # It declares no forward and no leftovers, and what reaches its weights is CLIP-3's matter. It does not
    # train with Muon, which takes matrices only, nor in 16 bits. The losses that it prints have too few digits to tell
    # them apart.
    silent = frozenset(
        {"MODEL-1", "MODEL-6", "CLIP-6", "EVAL-12", "OPT-19", "OPT-22", "PREC-14", "REPORT-8", "REPORT-9"}
    )
    found = failures(load_subject("examples.plain_loop_adapter:PlainLoop"), silent)
    assert found == {"OPT-11": "fail", "CLIP-3": "fail"}


def test_the_script_of_globals_is_audited() -> None:
    script = (ROOT / "examples" / "globals_script.py").read_text(encoding="utf-8")
    audited = audit(script, "globals_script", ["--seed", "3"])
    assert audited.code == 0, audited.output
    assert audited.found("fault", "advice") == []
    assert len(audited.found("ok")) > 30


def test_the_script_of_globals_is_judged() -> None:
    subject = load_subject(str(ROOT / "examples" / "globals_adapter.py:Globals"))
    chosen = find_clauses(["INIT-2", "DECAY", "ACC-1", "CLIP", "RESUME", "OPT-1", "DIST-1"], catalogue())
    with Session(subject) as session:
        results = {key: session.judge(clause) for key, clause in chosen.items()}
    outcomes = {key: result.outcome for key, result in results.items()}
    assert {key for key, outcome in outcomes.items() if outcome not in ("pass", "n/a")} == {"CLIP-3", "RESUME-3"}
    assert {"INIT-2", "ACC-1", "RESUME-1", "RESUME-2", "DIST-1"} <= {k for k, o in outcomes.items() if o == "pass"}
    assert "lacks any-optimizer: globals_script.py makes an AdamW itself" in results["OPT-1"].reason


UNDECLARED = frozenset({"PREC-7", "MODEL-1", "MODEL-2", "MODEL-3", "MODEL-6", "DROP-5"})
"""PREC-7 may say that it sees no table: x-transformers computes positions anew in each forward. The others that its
policy declares no forward."""


@pytest.mark.slow  # ten seconds
def test_x_transformers_is_judged() -> None:
    assert failures(x_transformers(), UNDECLARED) == {}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", SPECIAL)
def test_special_tensors_of_x_transformers_do_not_decay(shape: str, tied: bool, tmp_path: Path) -> None:
    optimizer = OptimizerChoice.of("torch.optim.AdamW", lr=1e-2, weight_decay=0.1)
    recipe = Recipe(shape=shape, tied=tied, n_layer=1, updates=1, optimizer=optimizer, directory=tmp_path)  # type: ignore[arg-type] # a name of the Literal
    with record(tmp_path) as trace:
        x_transformers().train(recipe)
    decay = {name: group.settings["weight_decay"] for group in trace.updates[0].groups for name in group.tensors}
    assert {name for name in decay if decay[name] == 0.0} == SPECIAL[shape]
    matrices = {name for name, info in trace.tensors.items() if info.owner == "Linear" and len(info.shape) == 2}
    assert {name for name in decay if decay[name] == 0.1} == matrices
    assert set(decay) == set(trace.tensors)
    assert ("to_logits.weight" in matrices) is not tied


@pytest.fixture
def few_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty files of the standard library instead of all."""
    found = standard_library()
    monkeypatch.setattr("reference.data.prepare.standard_library", lambda: found[:30])


@pytest.mark.usefixtures("few_sources")
def test_ten_lines_train_our_gpt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = train_gpt.main(tmp_path, updates=60)
    assert isinstance(text, str)
    first, last = capsys.readouterr().out.split(" nats")[0].split(" -> ")
    assert float(first) > 5.0 > 3.6 > float(last)


@pytest.mark.usefixtures("few_sources")
def test_ten_lines_train_a_module_of_x_transformers(tmp_path: Path) -> None:
    pytest.importorskip("x_transformers", reason="x-transformers is not installed: pip install x-transformers")
    result = train_x_transformers.main(tmp_path, updates=30)
    assert result.records[0].loss > 5.0 > 3.6 > result.records[-1].loss
    memory = dict(result.model.named_parameters())["memory_tokens"]
    decay = {id(t): group["weight_decay"] for group in result.optimizer.param_groups for t in group["params"]}
    assert decay[id(memory)] == 0.0
    assert set(decay.values()) == {0.0, 0.1}


@pytest.mark.parametrize("name", ["train_gpt", "train_x_transformers"])
def test_ten_lines_are_ten(name: str) -> None:
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    body = source[source.index("def main") : source.index("if __name__")].splitlines()
    assert len([line for line in body if line.strip()]) <= 12  # with its first line; one call may need two
