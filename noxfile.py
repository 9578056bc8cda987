"""The manual: ``nox -l`` lists what can be done, ``nox -s NAME`` does it.

All sessions share one environment, made by the session ``environment`` on first use, so torch is installed once.
With ``--no-venv`` they use the Python that runs nox, and install nothing.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["conformance"]
nox.options.reuse_venv = "yes"
nox.options.error_on_external_run = True

HERE = Path(__file__).parent
LATEST = HERE / "reports" / "latest"  # ignored by git: a second run leaves the checkout clean
EXTRAS = {"litgpt", "transformers", "x-transformers"}  # subjects, each installed by an extra of the same name
PEERS = {  # the stacks of the matrix: subject, and what pip installs for it beside this package
    "litgpt-0.4.12": ("litgpt", ["jsonargparse[signatures]", "requests", "tokenizers", "tqdm"]),
    "litgpt-0.5.13": ("litgpt", ["litgpt==0.5.13", "requests"]),
    "transformers": ("transformers", ["transformers", "accelerate"]),
    "x-transformers": ("x-transformers", ["x-transformers"]),
    "plain-loop": ("examples.plain_loop_adapter:PlainLoop", []),
    "reference": ("reference", []),
}

# One thread: the models are tiny, and threads only wait for each other. Warnings and progress need no buffering.
VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

_python = sys.executable


# Where there is a GPU, ranks are spawned instead of forked: slower, and planted faults do not reach them.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def run(session: nox.Session, *arguments: str, **variables: str) -> None:
    """Run Python in the shared environment."""
    session.run(_python, *arguments, env=VARIABLES | variables, external=True)


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
    names = [*extras, *filter(None, [alone])]
    if installed[:1] == wanted and (not names or names == installed[1:]):
        return  # nothing changed: pip would take seconds to find that out

    def pip(*arguments: str) -> None:
        session.run(_python, "-m", "pip", *arguments, silent=True, external=True)

    if names != installed[1:]:
        pip("uninstall", "--quiet", "--yes", *sorted(EXTRAS), "accelerate")
    target = f".[{','.join(extras)}]" if extras else "."
    pip("install", "--quiet", "--upgrade", "pip>=25.1")  # knows --group
    groups = ("--group", "lint", "--group", "build", "--group", "test")
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
        arguments += ["--report", os.path.relpath(LATEST / "conformance.json")]
    command = [_python, "-m", "pytest", "--pyargs", "conformance.suites", *arguments]
    code = subprocess.run(command, env=os.environ | VARIABLES, check=False).returncode
    if code == 2:  # a mistake in the command line, told in one sentence; nox itself knows only 0 and 1
        sys.exit(code)
    if code:
        session.error(f"{' '.join(arguments)}: see the letter above")


@nox.session(venv_backend="none", requires=["environment"], default=False)
def tests(session: nox.Session) -> None:
    """Run this project's own tests; `-- tests/conformance/test_trace.py -k hooks` selects."""
    run(session, "-m", "pytest", *session.posargs, **NO_GPU)


@nox.session(venv_backend="none", requires=["environment"], default=False)
def bench(session: nox.Session) -> None:
    """Measure optimizers and training steps on a GPU; `-- --quick`, `-- --compare FILE`, `-- --device cpu` (CI)."""
    small = any(word.startswith(("--quick", "--device", "--help")) for word in session.posargs)
    if not small and _python != sys.executable and shutil.which("nvidia-smi"):
        # What the bench measures beside the reference. LitGPT alone: what it requires does not go together with
        # transformers, and its model needs none of it.
        install(session, ["torchao", "transformers", "x-transformers"], alone="litgpt")
    code = subprocess.run([_python, "-m", "conformance.bench", *session.posargs], check=False).returncode
    if code == 2:
        sys.exit(code)
    if code:
        session.error("see above")


@nox.session(venv_backend="none", requires=["environment"], default=False)
def mutants(session: nox.Session) -> None:
    """Print the kill matrix: every planted fault against every clause (some ten minutes)."""
    run(session, "-m", "tests.mutants.kill_matrix", *session.posargs, **NO_GPU)


@nox.session(default=False)
def parity(session: nox.Session) -> None:
    """Run the tests that need the real transformers, in an environment of its own: litgpt wants another release."""
    session.install("--quiet", "--constraint", "constraints.txt", "--editable", ".[transformers]")
    names = [f"tests/test_{name}.py" for name in ("huggingface_parity", "subject_transformers", "bench_training")]
    session.run("python", "-m", "pytest", *names, *session.posargs, env=VARIABLES | NO_GPU)


@nox.session(default=False)
@nox.parametrize("peer", list(PEERS), ids=list(PEERS))
def peers(session: nox.Session, peer: str) -> None:
    """Judge each stack of the matrix in an environment of its own: they pin different releases."""
    subject, packages = PEERS[peer]
    session.install("--quiet", "--constraint", "constraints.txt", "--editable", ".", *packages)
    if peer == "litgpt-0.4.12":  # pins a Lightning and a numpy of its time; it runs with today's
        session.install("--quiet", "--no-deps", "litgpt==0.4.12")
    LATEST.mkdir(parents=True, exist_ok=True)
    report = os.path.relpath(LATEST / f"{peer}.json")
    command = ["python", "-m", "pytest", "--pyargs", "conformance.suites", "--subject", subject, "--report", report]
    deviations = Path("reports/deviations") / f"{peer}.toml"
    if deviations.exists():  # what the stack does otherwise by design
        command += ["--deviations", str(deviations)]
    session.run(*command, *session.posargs, env=VARIABLES, success_codes=[0, 1])  # a finding is no failure of ours


@nox.session(venv_backend="none", requires=["environment"], default=False)
def report(session: nox.Session) -> None:
    """Turn results into pages: reports/latest/page/index.html (clauses), reports/latest/bench/index.html (bench)."""
    files = session.posargs or [os.path.relpath(path) for path in sorted((HERE / "reports/conformance").glob("*.json"))]
    target = ["--kill-matrix", "reports/kill-matrix.json", "--out", os.path.relpath(LATEST / "page")]
    run(session, "-m", "conformance", "report", *files, *target)
    folders = sorted(path.parent for path in (HERE / "reports/bench").rglob("summary.json"))  # whole runs before parts
    summaries = [os.path.relpath(folder / "summary.json") for folder in folders]
    if summaries and not session.posargs:
        run(session, "-m", "conformance.bench.page", *summaries, "--out", os.path.relpath(LATEST / "bench"))


@nox.session(venv_backend="none", requires=["environment"], default=False)
def lint(session: nox.Session) -> None:
    """Check style, formatting and types with ruff and mypy."""
    run(session, "-m", "ruff", "check", ".")
    run(session, "-m", "ruff", "format", "--check", ".")
    run(session, "-m", "mypy")
