"""new-adapter: a skeleton that says what was seen, asks for the rest, and is judged at once without an error."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from conformance.cli import main
from conformance.errors import UsageError
from conformance.recording.files import Files
from conformance.scripts import run_script
from conformance.skeleton.command import class_name
from conformance.skeleton.found import rounded
from tests.audits.runner import NEEDS, SCRIPTS, start

EXAMPLES = Path(__file__).parents[2] / "examples"
SEEN = {
    "nanogpt_like": ["model: GPT", "weight_decay 0.1; 14", "microbatches per update: 3 of 4", "norm, to 0.5", "1337"],
    "lightning_trainer": ['"VOCAB": recipe.vocab_size,  # 83', "max_steps=8 -> recipe.updates", "torch.optim.AdamW"],
    "hf_trainer": ['"BLOCK": recipe.block_size,  # 24', "n_layer=2 -> recipe.n_layer", "GPT2LMHeadModel"],
    "accelerate_args": ['"--lr", recipe.optimizer.rate,  # 0.002', '"llama-shape",', '"clip",'],
    "resumable": ["looks like a checkpoint", '"--steps", recipe.updates'],
    "plain_loop": ["return True", "groups: ", "(constant)"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path


def skeleton_of(folder: Path, name: str, *arguments: str) -> str:
    """Return the adapter that is written for a script, made by a forked process."""
    script = EXAMPLES / f"{name}.py" if name == "plain_loop" else SCRIPTS / f"{name}.py"
    (folder / script.name).write_text(script.read_text(encoding="utf-8"), encoding="utf-8")
    code = start(folder, 1, ["new-adapter", script.name, *(["--", *arguments] if arguments else [])])
    assert code == 0, (folder / "terminal-new-adapter-0").read_text(encoding="utf-8")
    return (folder / f"{name}_adapter.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SEEN)
def test_skeleton_runs(folder: Path, name: str) -> None:
    if importlib.util.find_spec(NEEDS.get(name, "torch")) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    text = skeleton_of(folder, name)
    for words in SEEN[name]:
        assert words in text
    subject = f"{name}_adapter.py:{class_name(name)}"
    assert main(["run", "--subject", subject, "--report", "report.json"]) == 0
    results = json.loads((folder / "report.json").read_text(encoding="utf-8"))["clauses"]
    assert {result["outcome"] for result in results} == {"n/a"}
    assert any("question" in result["reason"] and "is open" in result["reason"] for result in results)


def test_nothing_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train.py").write_text("raise SystemExit('it must not even run')\n", encoding="utf-8")
    (folder / "train_adapter.py").write_text("mine\n", encoding="utf-8")
    assert main(["new-adapter", "train.py"]) == 2
    assert "not overwritten: name another file with --out" in capsys.readouterr().err
    assert (folder / "train_adapter.py").read_text(encoding="utf-8") == "mine\n"


@pytest.mark.parametrize(
    ("content", "arguments", "told"),
    [
        ("", ["gone.py"], "No such script: gone.py"),
        ("", ["train.py", "--out", "folder-that-is-not/a.py"], "is not there: make it first"),
        ("", ["train.py", "--out", "my-adapter.py"], "a name that Python can import"),
        ("", ["train.py"], "made no update that was seen"),
        ("def", ["train.py"], "is not Python: invalid syntax"),
        ("raise SystemExit(3)", ["train.py"], "ended with exit code 3"),
    ],
)
def test_mistakes(
    folder: Path, capsys: pytest.CaptureFixture[str], content: str, arguments: list[str], told: str
) -> None:
    (folder / "train.py").write_text(content, encoding="utf-8")
    assert main(["new-adapter", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert told in error
    assert error.endswith(".")
    assert sorted(path.name for path in folder.iterdir()) == ["train.py"]


def test_run_script(folder: Path) -> None:
    script = folder / "train.py"
    script.write_text(
        "from __future__ import annotations\nimport sys\nfrom pathlib import Path\nsize, rate = 3, 0.1\n"
        "def batch():\n    return 'own'\n"
        "for size_in_loop in range(2):\n    rate = rate * 2\n"
        "if __name__ == '__main__':\n    words = sys.argv[1:]\n    Path('out.txt').write_text(batch() * size)\n",
        encoding="utf-8",
    )
    out = folder / "out"
    out.mkdir()
    found = run_script(script, ["--a", 1], {"size": 2, "rate": 1.0, "batch": lambda: "given"}, folder=out)
    assert (found["size"], found["rate"], found["words"]) == (2, 4.0, ["--a", "1"])
    assert (out / "out.txt").read_text(encoding="utf-8") == "givengiven"
    assert sys.modules["__main__"].__dict__ is not found
    with pytest.raises(Exception, match="gives no value to size_in_loop at its top level"):
        run_script(script, settings={"size_in_loop": 2})


READS = """
from pathlib import Path
import torch
with open("data/input.txt") as file:
    text = file.read()
ids = torch.tensor([ord(c) % 16 for c in text])
model = torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 16))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(5):
    loss = torch.nn.functional.cross_entropy(model(ids[step : step + 9]), ids[step + 1 : step + 10])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
    optimizer.step()
    optimizer.zero_grad()
Path("out.txt").write_text("done")
"""


def test_a_script_finds_what_it_reads(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "input.txt").write_text("some text to train on", encoding="utf-8")
    script = folder / "train.py"
    script.write_text(READS, encoding="utf-8")
    assert start(folder, 1, ["new-adapter", script.name]) == 0
    text = (folder / "train_adapter.py").read_text(encoding="utf-8")
    assert 'files = ["data/input.txt"]' in text
    assert "question 3 of train_adapter.py is open: train.py clips" in text
    assert "(grad_clip = 0.25)" in text
    out = folder / "elsewhere"
    out.mkdir()
    with pytest.raises(UsageError, match=r"reads data/input\.txt, .*files=\['data/input\.txt'\]"):
        run_script(script, folder=out)
    with pytest.raises(UsageError, match=r"is said to read gone\.txt, which is neither"):
        run_script(script, folder=out, files=["gone.txt"])
    files = Files(out, None)
    run_script(script, folder=out, files=["data/input.txt"])
    assert (out / "data" / "input.txt").is_symlink()
    (out / "ckpt.pt").write_text("state", encoding="utf-8")
    assert files.written() == [out / "ckpt.pt"]  # the data are no checkpoint


@pytest.mark.parametrize(
    ("value", "error", "text"), [(0.0205, 0.019, "0.02"), (0.12498, 1e-4, "0.125"), (0.0205, 1e-3, "0.0205")]
)
def test_a_measured_number_is_the_shortest_that_it_may_be(value: float, error: float, text: str) -> None:
    assert rounded(value, error) == text
