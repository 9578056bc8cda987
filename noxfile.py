"""The sessions of this project: ``nox -l`` lists them, ``nox -s NAME`` runs one.

Most sessions share one environment, made by the session ``environment`` on first use, so torch is installed once.
With ``--no-venv`` they use the Python that runs nox, and install nothing.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["conformance"]
nox.options.reuse_venv = "yes"
nox.options.error_on_external_run = True

HERE = Path(__file__).parent
LATEST = HERE / "reports" / "latest"  # ignored by git: a second run leaves the checkout clean
# Subjects, each installed by an extra of the same name.
EXTRAS = {
    *("accelerate", "deepspeed", "lightning-trainer", "litgpt"),
    *("torchtitan", "transformers", "trl", "x-transformers"),
}
PACKAGE = ".[reference,optimizers,bench,{}]"  # what the default sessions need, and more extras
PEERS = {  # the stacks of the matrix: subject, and what pip installs for it beside this package
    "litgpt-0.4.12": ("litgpt", ["jsonargparse[signatures]", "requests", "tokenizers", "tqdm"]),
    "litgpt-0.5.13": ("litgpt", ["litgpt==0.5.13", "requests"]),
    "litgpt-lora": ("litgpt-lora", ["litgpt==0.5.13", "requests"]),
    "transformers": ("transformers", ["transformers", "accelerate"]),
    "transformers-peft": ("transformers-peft", ["transformers", "accelerate", "peft"]),
    "x-transformers": ("x-transformers", ["x-transformers"]),
    "lightning-trainer": ("lightning-trainer", ["torchdata"]),
    "accelerate": ("accelerate", ["accelerate"]),
    "deepspeed": ("deepspeed", ["deepspeed"]),
    "trl": ("trl", ["trl", "datasets"]),
    "torchtitan": ("torchtitan", ["torchtitan==0.2.2"]),
    "nanogpt": ("nanogpt", []),
    "nanochat": ("nanochat", ["filelock", "kernels", "psutil", "pyarrow", "requests", "rustbpe", "tiktoken", "wandb"]),
    "plain-loop": ("examples.plain_loop_adapter:PlainLoop", []),
    "reference": ("reference", ["peft"]),
}
SHOWN = "nvidia-h200"  # the run of the bench whose figures the docs show, and which the page shows first
CHECKOUTS = {"nanogpt": "NANOGPT", "nanochat": "NANOCHAT"}  # peers that no package index has: where their checkout is
ON_GPU = {"torchtitan"}  # peers that train on a GPU only
PYTHONS, TORCHES = ("3.11", "3.12", "3.13"), ("2.11.0", "2.12.1", "2.13.0", "2.14.1")

# One thread: the models are tiny, and threads only wait for each other. Warnings and progress need no buffering.
VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
# Where there is a GPU, ranks are spawned instead of forked: slower, and planted faults do not reach them.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
SUITES = ("-m", "pytest", "-p", "conformance.plugin", "--pyargs", "conformance.suites")

_python = sys.executable


def run(session: nox.Session, *arguments: str, **variables: str) -> None:
    """Run Python in the shared environment."""
    session.run(_python, *arguments, env=VARIABLES | variables, external=True)


def run_to_its_result(session: nox.Session, *arguments: str) -> None:
    """Run Python, and end with its exit code: 1 for findings is a result, which nox would call an abort."""
    code = subprocess.run([_python, *arguments], env=os.environ | VARIABLES, check=False).returncode
    if code:
        sys.exit(code)


@contextlib.contextmanager
def installing(session: nox.Session, what: str) -> Iterator[None]:
    """Say what is installed, and every ten seconds that it still is: pip says nothing where there is no terminal."""
    session.log(f"Installing {what}: this takes minutes, and happens once.")
    over, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not over.wait(10):
            session.log(f"Installing: {time.monotonic() - began:.0f} s so far.")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@nox.session(default=False)
def environment(session: nox.Session) -> None:
    """Install the package and its tools once, for all other sessions (they call this by themselves)."""
    global _python
    if session.virtualenv.is_sandboxed is False:  # --no-venv: whatever is installed is used
        _python = sys.executable
        return
    _python = str(Path(session.bin) / "python")
    # One at a time: litgpt and transformers want different releases of huggingface-hub, and what is left of one
    # breaks the other.
    install(session, sorted(EXTRAS.intersection(session.posargs))[:1])


def install(session: nox.Session, extras: list[str], alone: str = "") -> None:
    """Install the package with extras into the shared environment; nothing if that was done before.

    Args:
        session: that runs.
        extras: of pyproject.toml. Without any, those that are there stay.
        alone: one more package, without what it requires.
    """
    stamp = Path(_python).parents[1] / "installed"
    installed = stamp.read_text().split() if stamp.exists() else []
    files = [HERE / "pyproject.toml", HERE / "constraints.txt"]
    wanted = [hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()]
    if not extras and not alone and not installed:
        extras = ["finetune"]  # what the reference's own clauses on fine-tuning train with; it does not suit litgpt
    names = [*extras, *filter(None, [alone])]
    if installed[:1] == wanted and (not names or names == installed[1:]):
        return  # nothing changed: pip would take seconds to find that out

    def pip(*arguments: str) -> None:
        session.run(_python, "-m", "pip", *arguments, silent=True, external=True)

    with installing(session, ", ".join(["PyTorch and the tools", *names])):
        if names != installed[1:]:
            pip("uninstall", "--quiet", "--yes", *sorted(EXTRAS), "peft")
        pip("install", "--quiet", "--upgrade", "pip>=25.1")  # knows --group
        groups = ("--group", "lint", "--group", "build", "--group", "test")
        target = PACKAGE.format(",".join(extras)).replace(",]", "]")
        pip("install", "--quiet", "--constraint", "constraints.txt", "--editable", target, *groups)
        if alone:
            pip("install", "--quiet", "--constraint", "constraints.txt", "--no-deps", alone)
    stamp.write_text(" ".join([*wanted, *names]))


@nox.session(venv_backend="none", requires=["environment"])
def conformance(session: nox.Session) -> None:
    """Judge a training stack: the reference, or `-- --subject litgpt`, or `-- --subject your.module:Adapter`."""
    LATEST.mkdir(parents=True, exist_ok=True)
    arguments = list(session.posargs)
    if not any(argument.startswith("--report") for argument in arguments):
        subject = re.search(r"--subject[ =](\S+)", " ".join(arguments))
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", subject[1] if subject else "reference")
        arguments += ["--report", os.path.relpath(LATEST / f"{name}.json")]  # one file for each subject
    run_to_its_result(session, *SUITES, *arguments)


@nox.session(venv_backend="none", requires=["environment"], default=False)
def tests(session: nox.Session) -> None:
    """Run this project's own tests on all cores; `-- tests/conformance/test_trace.py -k hooks` runs a selection."""
    tests_of(session)


def tests_of(session: nox.Session, *chosen: str) -> None:
    """Run pytest on all cores, unless the user says on how many."""
    cores = [] if any(word.startswith("-n") for word in session.posargs) else ["-n", "auto", "--dist", "loadfile"]
    run(session, "-m", "pytest", *cores, *chosen, *session.posargs, **NO_GPU)


@nox.session(venv_backend="none", requires=["environment"], default=False)
def slow(session: nox.Session) -> None:
    """Run the slow tests whole: 2,000 kills, of which CI does 300, 2,004 fuzzed cases, 300 resumes, and the others."""
    tests_of(session, "-m", "slow or kills")


@nox.session(venv_backend="none", requires=["environment"], default=False)
def bench(session: nox.Session) -> None:
    """Measure optimizers and training steps on a GPU; `-- --quick`, `-- --compare FILE`, `-- --device cpu` (CI)."""
    small = any(word.startswith(("--quick", "--device", "--help")) for word in session.posargs)
    if not small and _python != sys.executable and shutil.which("nvidia-smi"):
        # What the bench measures beside the reference. LitGPT alone: what it requires does not go together with
        # transformers, and its model needs none of it.
        install(session, ["finetune", "torchao", "transformers", "x-transformers"], alone="litgpt")
    run_to_its_result(session, "-m", "conformance.bench", *session.posargs)


@nox.session(venv_backend="none", requires=["environment"], default=False)
def docs(session: nox.Session) -> None:
    """Check that the generated parts of the docs match the code and the reports; `-- --write` updates them."""
    run_to_its_result(session, "docs/generate.py", *session.posargs)


@nox.session(venv_backend="none", requires=["environment"], default=False)
def mutants(session: nox.Session) -> None:
    """Print the kill matrix, every planted fault against every clause; this takes more than half an hour."""
    run(session, "-m", "tests.mutants.kill_matrix", *session.posargs, **NO_GPU)


@nox.session(default=False)
def parity(session: nox.Session) -> None:
    """Run the tests that need the real transformers, in an environment of its own: litgpt wants another release."""
    groups = ("--group", "test")
    target = PACKAGE.format("transformers,finetune")
    with installing(session, "PyTorch and transformers into an environment of their own"):
        session.install("--quiet", "--constraint", "constraints.txt", "--editable", target, *groups)
    names = ["reference/test_huggingface_parity", "bench/test_training"]
    names += [f"reference/test_finetuning{part}" for part in ("", "_lora", "_export")]
    files = [f"tests/{name}.py" for name in names]
    session.run("python", "-m", "pytest", *files, *session.posargs, env=VARIABLES | NO_GPU)


@nox.session(default=False)
@nox.parametrize("peer", list(PEERS), ids=list(PEERS))
def peers(session: nox.Session, peer: str) -> None:
    """Judge each stack of the matrix in an environment of its own: they pin different releases."""
    subject, packages = PEERS[peer]
    if peer in CHECKOUTS and not os.environ.get(CHECKOUTS[peer]):
        session.skip(f"set the environment variable {CHECKOUTS[peer]} to the path of a checkout")
    if peer in ON_GPU and shutil.which("nvidia-smi") is None:
        session.skip(f"{peer} trains on a GPU, and this machine has none")
    target = PACKAGE.format("").replace(",]", "]")
    with installing(session, f"PyTorch and {peer} into an environment of their own"):
        session.install("--quiet", "--constraint", "constraints.txt", "--editable", target, *packages)
        if peer == "litgpt-0.4.12":  # pins a Lightning and a numpy of its time; it runs with today's
            session.install("--quiet", "--no-deps", "litgpt==0.4.12")
    LATEST.mkdir(parents=True, exist_ok=True)
    command = ["python", *SUITES, "--subject", subject, "--report", os.path.relpath(LATEST / f"{peer}.json")]
    deviations = Path("reports/deviations") / f"{peer}.toml"
    if deviations.exists():  # what the stack does otherwise by design
        command += ["--deviations", str(deviations)]
    session.run(*command, *session.posargs, env=VARIABLES, success_codes=[0, 1])  # findings are a result


@nox.session(default=False, python=PYTHONS)
@nox.parametrize("torch", TORCHES)
def versions(session: nox.Session, torch: str) -> None:
    """Judge the reference under each supported Python that is installed, and each supported PyTorch."""
    with installing(session, f"PyTorch {torch} for Python {session.python}, which may be gigabytes"):
        session.install("--quiet", f"torch=={torch}", PACKAGE.format("").replace(",]", "]"))
    session.run("python", "-m", "conformance", "run", *session.posargs, env=VARIABLES)


@nox.session(venv_backend="none", requires=["environment"], default=False)
def report(session: nox.Session) -> None:
    """Turn results into pages: reports/latest/page/index.html (clauses), reports/latest/bench/index.html (bench)."""
    files = session.posargs or [os.path.relpath(path) for path in sorted((HERE / "reports/conformance").glob("*.json"))]
    target = ["--kill-matrix", "reports/kill-matrix.json", "--findings", "reports/findings"]
    target += ["--out", os.path.relpath(LATEST / "page")]
    run(session, "-m", "conformance", "report", *files, *target)
    folders = [path.parent for path in (HERE / "reports/bench").rglob("summary.json")]
    folders.sort(key=lambda folder: (folder.name != SHOWN, folder))  # whole runs before parts
    summaries = [os.path.relpath(folder / "summary.json") for folder in folders]
    if summaries and not session.posargs:
        run(session, "-m", "conformance.bench.page", *summaries, "--out", os.path.relpath(LATEST / "bench"))


@nox.session(venv_backend="none", requires=["environment"], default=False)
def lint(session: nox.Session) -> None:
    """Check style, formatting and types with ruff and mypy."""
    run(session, "-m", "ruff", "check", ".")
    run(session, "-m", "ruff", "format", "--check", ".")
    run(session, "-m", "mypy")
