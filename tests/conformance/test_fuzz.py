"""Broken adapters, result files, deviations, options, scripts and records, by the hundred: the judge ends well on each.

Ends well: with a letter and exit code 0 or 1, or with one sentence of less than 400 characters and exit code 1 or 2; no
traceback, no hang, no file outside the case's own folder. What the trainer is given is in tests/reference/test_fuzz.py.
"""

import contextlib
import importlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from conformance import cli
from conformance.auditing.rule import RULES
from conformance.bench import __main__ as bench
from conformance.bench import page as bench_page
from conformance.bench.plain import to_plain
from conformance.capabilities import CAPABILITIES
from conformance.clause import catalogue
from conformance.options import AUDIT_OPTIONS, OPTIONS
from tests.bench import made_up
from tests.conformance.auditing.loop import SCRIPT
from tests.fuzzing import ODD, SENTENCE, clock, damage, damages, fuzzed, listing, numbers, texts, values

ADAPTER = """\
import contextlib, logging, os, signal, sys, threading, warnings
import torch
from torch import nn
from torch.nn import functional as F
from conformance import NotApplicable, Policy
from conformance.subjects.reference import ReferencePolicy

class Mine:
    name, version, policy = {name}, {version}, {policy}
    lacks = {lacks}

    {method}
        model = nn.Sequential(nn.Embedding(recipe.vocab_size, 4), nn.Linear(4, recipe.vocab_size))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        {before}
        for batch in recipe.batches():
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            {inside}
            loss.backward()
            optimizer.step()
        {after}
{more}
"""
LACKS = repr({key: f"{key} was not built" for key in CAPABILITIES if key != "gpt-shape"})
DEEDS = [
    *("pass", "pass", "raise ValueError('x' * 5000)", "raise BaseException('\\ud800')", "raise SystemExit('bye')"),
    *("raise 7", "raise RecursionError", "raise NotApplicable('')", "raise KeyError(None)", "os._exit(0)"),
    *("sys.stdout.close()", "sys.stdout = None", "sys.stderr = None", "os.chdir('/')", "yield", "return", "1 / 0"),
    *("torch.set_default_dtype(torch.float64)", "torch.set_default_device('meta')", "torch.set_grad_enabled(False)"),
    *("torch.autocast('cpu').__enter__()", "torch.inference_mode().__enter__()", "torch.set_num_threads(2)"),
    *("print('[/bold]\\x1b[31m\\ud800', flush=True)", "print('loss nan ' * 20_000)", "logging.error('\\udcff')"),
    *("warnings.warn('w' * 5000)", "warnings.simplefilter('error')", "logging.disable()", "sys.setrecursionlimit(90)"),
    *("threading.Thread(target=print, args=('late',)).start()", "os.environ.clear()", "sys.argv.clear()"),
    *("os.kill(os.getpid(), signal.SIGTERM) if signal.getsignal(signal.SIGTERM) else 0", "signal.alarm(0)"),
    *("recipe.steps = 9", "recipe = None", "model = None", "optimizer = None", "batch = None", "loss = None"),
    *("batch = batch.float()", "loss = loss * float('nan')", "loss = loss.detach()", "loss = model[1].weight"),
    *("optimizer.param_groups.clear()", "optimizer.param_groups[0]['lr'] = 'x'"),
    *("model.to('meta')", "model[0].weight.data = torch.empty(0)", "optimizer.param_groups[0]['lr'] = None"),
    *("model[1].weight.grad = model[1].weight.to_sparse()", "model.zero_grad = None", "F = None", "os.chdir('..')"),
    *("model.to(torch.complex64)", "model.half()", "model[1] = None", "del model[1]", "torch = None"),
    *("open('here.txt', 'w').write('x')", "open('model.safetensors', 'wb').write(b'{')", "os.mkfifo('state.pt')"),
    *("os.symlink('loop', 'loop')", "os.mkdir('step-00000001')", "torch.save(object(), 'x.pt')", "sys.exit()"),
    *("torch.manual_seed(0)", "torch.use_deterministic_algorithms(True)", "sys.settrace(None)", "type(self).lacks = 7"),
    *("type(self).name = None", "type(self).policy = None", "self.lacks.clear()", "while True: break", "del self"),
]  # fmt: skip
METHODS = ["def train(self, recipe):"] * 6
METHODS += ["def train(self):", "def train(self, recipe, more):", "async def train(self, recipe):"]
METHODS += [
    "@property\n    def train(self):\n        recipe = None",
    "@staticmethod\n    def train(recipe):\n        self = Mine",
]
POLICIES = ["ReferencePolicy()"] * 4
POLICIES += ["None", "7", "Policy", "Policy()", "type('P', (), {'initial': 1})()"]
POLICIES += [
    f"type('P', (ReferencePolicy,), dict({method}=lambda *a, **k: {answer}))()"
    for method in ("initial", "decays", "learning_rate", "position")
    for answer in ("None", "float('nan')", "'x'", "1 / 0", "a")
]
MORE = ["", "", "", "    def load(self, *a): raise ValueError\n", "    def load(self, *a): return 7\n"]
MORE += ["    def __init__(self): raise KeyError\n", "    def __init__(self, x): pass\n", "    as_of = '0.1'\n"]
MORE += ["    as_of = 7\n", "    def __getattr__(self, name): raise RuntimeError(name)\n", "    __slots__ = ('x',)\n"]
MORE += ["    def __getattribute__(self, name): 1 / 0\n", "1 +", "raise KeyError('import')", "sys.exit('import')", "\0"]
MORE += ["def Mine(): return 7\n", "Mine = None\n", "Mine = type(Mine)\n", "del Mine\n", "Mine = [Mine]\n", "(" * 3000]
names = st.sampled_from(
    ["'mine'"] * 5 + ["None", "7", "''", "'[/x]\\x1b\\ud800'", "'n' * 9000", "property(lambda s: 1 / 0)"]
)
lacking = st.sampled_from(
    [LACKS] * 6
    + ["{}", "None", "[]", "{'flight': 'x'}", "{'load': ''}", "{1: 2}", "{'x' * 9000: 'y'}", "{'load': 'x' * 9000}"]
)
SOUND = {"name": "'mine'", "version": "'1'", "policy": "ReferencePolicy()", "method": METHODS[0], "more": ""}
SOUND["lacks"] = "{'load': 'it was not built'}"
CLAUSES = ["INIT-2", "OPT-1", "DECAY-1", "DECAY-2", "LR-1", "CLIP-1", "RESUME-1", "CAUSAL-1", "REPORT-1", "EVAL-1"]
CLAUSES += ["DATA-1", "ACC-6", "TIE-1", "PREC-1", "OPT-7", "EMB-1", "INIT-3", "ACC-1", "DATA-2"]
deeds = st.sampled_from(DEEDS)


class World:
    """A folder with one of each file that the judge reads, of which each case gets a copy to work in."""

    def __init__(self, root: Path) -> None:
        self.root, self.whole, self.case = root, root / "whole", root / "case"
        self.whole.mkdir()
        with (
            contextlib.chdir(self.whole),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            Path("train.py").write_text(SCRIPT)
            assert cli.main(["audit", "--updates", "2", "--trace", "one", "--", "train.py"]) == 0
            cli.main(["run", "--clause", "DECAY-1", "--clause", "OPT-3", "--report", "result.json"])
            Path("known.toml").write_text('[DECAY-1]\nreason = "bug 7"\nlink = "https://example.org"\n')
            matrix = json.loads((Path(__file__).parents[2] / "reports" / "kill-matrix.json").read_bytes())
            matrix["mutants"], matrix["harmless"] = matrix["mutants"][:2], matrix["harmless"][:2]
            Path("kills.json").write_text(json.dumps(matrix))
            Path("summary.json").write_text(json.dumps(to_plain(made_up.summary())))
        self.around = listing(root, self.case)

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """A copy of it all, as the working directory."""
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.whole, self.case)
        path, environment = sys.path[:], dict(os.environ)
        with contextlib.chdir(self.case):
            yield
        sys.path[:] = path
        assert dict(os.environ) == environment, "the environment was not put back"
        assert listing(self.root, self.case) == self.around, "something was written outside"

    def ends_well(self, *words: str, main: Callable[[list[str]], int] = cli.main) -> int:
        """Run a command line, hold it to what is promised, and return the exit code."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), clock():
            try:
                code = main(list(words))
            except SystemExit as end:  # argparse's
                code = int(end.code or 0)
        told = self.last = out.getvalue() + err.getvalue()
        assert code in (0, 1, 2), (words, code)
        assert "Hang" not in told, words
        assert "Traceback" not in told, told
        assert "the suite itself broke" not in told, told
        assert "the rule itself failed" not in told, told
        if code == 2:
            last = err.getvalue().splitlines()[-1]
            assert len(last) < SENTENCE, last
            assert last.isprintable(), last
        return code


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fuzz"))


@fuzzed(
    st.fixed_dictionaries({
        "name": names, "version": names, "policy": st.sampled_from(POLICIES), "lacks": lacking,
        "method": st.sampled_from(METHODS), "before": deeds, "inside": deeds, "after": deeds,
        "more": st.sampled_from(MORE),
    }),
    st.sampled_from(["", "", "", *SOUND]),
    st.sampled_from(CLAUSES),
)  # fmt: skip
def test_adapters(world: World, parts: dict[str, str], odd: str, clause: str) -> None:
    """Adapters whose training does what nobody expects, and one of whose other parts may be odd as well."""
    sound = {key: value for key, value in SOUND.items() if key != odd}
    with world.fresh():
        Path("fuzzed_adapter.py").write_text(ADAPTER.format(**parts | sound), errors="surrogatepass")
        importlib.invalidate_caches()
        try:
            world.ends_well(
                "run", "--subject=fuzzed_adapter:Mine", f"--clause={clause}", "--timeout=2", "--report=out.json"
            )
        finally:
            sys.modules.pop("fuzzed_adapter", None)


result_keys = st.sampled_from(
    ["schema", "subject", "environment", "partial", "summary", "clauses", "mutants", "harmless"]
)
row_keys = st.sampled_from(["id", "level", "requirement", "outcome", "expected", "seen", "reason", "seconds",
                            "since", "part", "mutant", "published", "named", "killed_by", "errors", "diff",
                            "variant"])  # fmt: skip


@fuzzed(
    st.sampled_from(["result.json", "kills.json"]),
    st.dictionaries(result_keys, values, max_size=1),
    st.dictionaries(row_keys, st.one_of(values, st.sampled_from(["DECAY-1", "NEW-1", "pass", "fail"])), max_size=2),
    st.lists(damages, max_size=1),
)
def test_result_files(
    world: World, name: str, changes: dict[str, Any], inside: dict[str, Any], hits: list[Any]
) -> None:
    """Results and kill matrices that are damaged, or made by somebody else."""
    with world.fresh():
        content = json.loads(Path(name).read_bytes())
        for rows in ("clauses", "mutants", "harmless"):
            for row in content.get(rows, [])[:1]:
                row.update({key: value for key, value in inside.items() if key in row})
        content.update(changes)
        Path(name).write_text(json.dumps(content))
        for hit in hits:
            damage(Path(name), *hit)
        world.ends_well("report", "result.json", "--kill-matrix", "kills.json", "--out", "pages")


MARKDOWN = [
    "# T",
    "## 1. DECAY-1 (must): x",
    "> ## 2. OPT-3",
    "```\n$ python x.py",
    "| a |\n|--:|\n| b |",
    "[a](b.md#c)",
]
MARKDOWN += [
    "<b>DECAY-1</b>",
    "![i](j)",
    "[a]: b",
    "- - -",
    "    x",
    "&#xD800;",
    "<!-- subjects: , x y z -->",
    "# ",
    "a\n===",
]


@fuzzed(st.lists(st.one_of(st.sampled_from(MARKDOWN), texts), max_size=8), st.lists(damages, max_size=1))
def test_findings(world: World, parts: list[str], hits: list[Any]) -> None:
    """Findings of all kinds of Markdown, that name a script, each other, or nothing that there is."""
    with world.fresh():
        Path("findings").mkdir()
        Path("findings/x.py").write_text("import x\n")
        for name in ("a.md", "b.md"):
            text = "<!-- subjects: reference -->\n" + "\n".join(parts)
            Path("findings", name).write_text(text, encoding="utf-8", errors="surrogatepass")
        for hit in hits:
            damage(Path("findings/a.md"), *hit)
        world.ends_well("report", "result.json", "--findings", "findings", "--out", "pages")


@fuzzed(
    st.dictionaries(
        st.one_of(st.sampled_from(["DECAY-1", "OPT-3", "decay-1"]), texts), st.one_of(texts, numbers), max_size=2
    ),
    st.lists(st.tuples(st.integers(0, 60), texts), max_size=2),
    st.lists(damages, max_size=1),
)
def test_deviations(world: World, entries: dict[str, Any], edits: list[tuple[int, str]], hits: list[Any]) -> None:
    """Files of deviations that are no TOML, name no clause, or give no reason."""
    with world.fresh():
        text = Path("known.toml").read_text()
        text += "".join(f"[{json.dumps(key)}]\nreason = {json.dumps(value)}\n" for key, value in entries.items())
        for place, more in edits:
            text = text[:place] + more + text[place:]
        Path("known.toml").write_text(text, encoding="utf-8", errors="surrogatepass")
        for hit in hits:
            damage(Path("known.toml"), *hit)
        world.ends_well("run", "--clause=DECAY-1", "--deviations=known.toml")


FLAGS = [
    *OPTIONS,
    *AUDIT_OPTIONS,
    "--noise",
    "--kill-matrix",
    "--findings",
    "--out",
    "--help",
    "--verbose",
    "-x",
    "--compare",
    "--only",
]
FLAGS += ["--device", "--quick", "--limit", "--across"]
COMMANDS: dict[str, list[str]] = {
    "run": ["--clause=DECAY-1", "--subject=reference"],
    "audit": ["--updates=1", "--then=stop", "--", "train.py"],
    "diff": ["one", "one"],
    "list": [],
    "explain": ["DECAY-1"],
    "report": ["result.json"],
    "bench": ["--compare", "summary.json", "summary.json"],
    "": [],
}
arguments = st.one_of(
    texts, st.sampled_from([*RULES, *catalogue(), "one", "result.json", "summary.json", "train.py", *ODD])
)
expectations = st.lists(st.sampled_from(["lr", "clip", "tied", "fresh", "seed", "no-weight-decay", "x"]), max_size=2)


@fuzzed(
    st.sampled_from(list(COMMANDS)),
    st.lists(st.tuples(st.sampled_from(FLAGS), arguments, st.booleans()), max_size=3),
    st.tuples(expectations, texts),
    st.booleans(),
)
def test_command_lines(
    world: World, command: str, given: list[tuple[str, str, bool]], expected: Any, first: bool
) -> None:
    """Options of all commands and none, with values of all kinds and none."""
    words = []
    for flag, value, joined in given:
        words += [f"{flag}={value}"] if joined else [flag, value]
    names, value = expected
    if command == "audit" and names:
        words += ["--expect", ",".join(f"{name}={value}" for name in names)]
    needed = COMMANDS[command]
    with world.fresh():
        if command == "bench":
            world.ends_well(*words, *needed, main=bench.main)
        else:
            world.ends_well(
                *filter(None, [command]), *(words + needed if first or command == "audit" else needed + words)
            )


places = st.lists(st.integers(0, 99), min_size=1, max_size=9)
plain = st.one_of(values, st.sampled_from([torch.zeros(3), torch.ones(()), {"_kind": "Facts"}, {"_kind": "x"}, {}]))


def put(content: Any, way: list[int], value: Any) -> None:
    """Put a value somewhere inside a record: the way says which branch to take at each level."""
    for left, number in enumerate(way, start=1 - len(way)):
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = keys[number % len(keys)]
        if not left or not isinstance(content[key], dict | list) or not content[key]:
            content[key] = value
            return
        content = content[key]


COMPARISONS = [["one", "two"], ["one", "two", "--noise", "two"], ["two", "one", "--format=json"]]


@fuzzed(st.lists(st.tuples(places, plain), max_size=3), st.lists(damages, max_size=1), st.sampled_from(COMPARISONS))
def test_records(world: World, edits: list[tuple[list[Any], Any]], hits: list[Any], words: list[str]) -> None:
    """Records of audits that are damaged, or made to look right."""
    with world.fresh():
        shutil.copytree("one", "two")
        path = Path("two", "process-0.pt")
        content = torch.load(path, weights_only=True)
        for way, value in edits:
            put(content, way, value)
        torch.save(content, path)
        for hit in hits:
            damage(path, *hit)
        world.ends_well("diff", *words)


row_fields = st.sampled_from([*made_up.summary().rows[0].__dataclass_fields__, "schema", "environment", "card", "rows"])


@fuzzed(st.dictionaries(row_fields, values, max_size=2), st.integers(0, 3), st.lists(damages, max_size=1))
def test_summaries_of_the_bench(world: World, changes: dict[str, Any], number: int, hits: list[Any]) -> None:
    """Summaries that are damaged, or made by somebody else."""
    with world.fresh():
        content = json.loads(Path("summary.json").read_bytes())
        for key, value in changes.items():
            rows = content["rows"]
            (rows[number] if rows and key in made_up.summary().rows[0].__dataclass_fields__ else content)[key] = value
        Path("new.json").write_text(json.dumps(content))
        for hit in hits:
            damage(Path("new.json"), *hit)
        world.ends_well("--compare", "summary.json", "new.json", main=bench.main)
        world.ends_well("new.json", "--out", "pages", main=bench_page.main)
