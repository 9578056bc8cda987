"""Made-up command lines and damaged or forged files of every kind, by the hundred: each ends well.

Ends well: success, or one sentence of less than 400 characters and exit code 1 or 2; no traceback, no hang, no file
outside the case's own folder. Seeded, so a failure comes again; the slow tier has ten times as many cases. What the
judge is given is in tests/conformance/test_fuzz.py.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.fabric  # noqa: F401 # now: its import would count as time of the first case
import pytest
import torch
import yaml  # type: ignore[import-untyped] # no types come with it
from hypothesis import strategies as st

from reference.__main__ import COMMANDS, main
from reference.cli.settings import Settings
from reference.config import DataConfig, GPTConfig, TrainConfig
from reference.data.sidecar import FORMAT, Sidecar, sampled_checksum
from reference.files import SUMS, digest, format_sums
from reference.interchange.layout import LLAMA
from tests.fuzzing import SENTENCE, clock, damage, damages, fuzzed, listing, texts, values
from tests.reference.commands import SHORT, SMALL, TEXT, train, write_data

# What would be right, but takes long, or starts other processes.
BOUNDED = ["--train.updates=2", "--train.warmup=0", "--train.microbatches=1", "--train.devices=1"]
BOUNDED += ["--train.num_nodes=1", "--train.compile=false", "--train.cooldown=null", "--directory=out/fuzzed"]

OPTIONS = [f"{group}.{name}" for group, kind in (("model", GPTConfig), ("train", TrainConfig), ("data", DataConfig))
           for name in kind.__dataclass_fields__]  # fmt: skip
OPTIONS += [*Settings.__dataclass_fields__, "config", "train.optimizer_args.lr", "checkpoint", "out", "text", "from"]
OPTIONS += ["tokenizer", "end-of-document", "split", "tokens", "top_k", "top_p", "temperature", "prompt", "seed"]
OPTIONS += ["microbatch_size", "format", "overwrite", "validation_share", "help", "print_config", "precision"]
options = st.one_of(st.sampled_from(OPTIONS), texts)


class World:
    """A folder with data, a run and an export, of which each case gets a copy to work in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.case = root / "case"
        self.whole = root / "whole"
        self.whole.mkdir()
        with contextlib.chdir(self.whole), contextlib.redirect_stderr(io.StringIO()):
            write_data(Path("data"))
            Path("text.txt").write_bytes(TEXT * 9)
            assert train("data", "--directory", "run") == 0
            assert main(["export", "--checkpoint", "run", "--out", "theirs"]) == 0
        self.around = listing(root, self.case)

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """A copy of it all, as the working directory."""
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.whole, self.case)
        with contextlib.chdir(self.case):
            yield
        assert listing(self.root, self.case) == self.around, "something was written outside"

    def ends_well(self, *words: str) -> int:
        """Run a command line, hold it to what is promised, and return the exit code."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), clock():
            try:
                code = main(words)
            except SystemExit as end:  # of --help
                code = int(end.code or 0)
        assert code in (0, 1, 2), (words, code)
        told = err.getvalue()
        assert "Traceback" not in told
        if code and words:
            last = told.splitlines()[-1]
            assert last.startswith("error: "), (words, told)
            assert len(last) < SENTENCE
            assert last.isprintable()
        return code


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fuzz"))


RUN = ["train", "--data.path=data", *SMALL, *SHORT]


@fuzzed(st.sampled_from([*COMMANDS, "train", "train"]), st.lists(st.tuples(options, texts, st.booleans()), max_size=5))
def test_command_lines(world: World, command: str, given_options: list[tuple[str, str, bool]]) -> None:
    """Options of all commands and none, with values of all kinds and none."""
    words = []
    for option, value, joined in given_options:
        words += [f"--{option}={value}"] if joined else [f"--{option}", value]
    needed = {
        "train": ["--data.path=data", *BOUNDED],
        "prepare": ["--text=text.txt", "--out=prepared"],
        "generate": ["--checkpoint=run", "--tokens=2"],
        "evaluate": ["--checkpoint=run", "--data=data"],
        "export": ["--checkpoint=run", "--out=exported"],
        "import": ["--from=theirs", "--out=imported"],
    }[command]
    first = [*SMALL, *SHORT] if command == "train" else []
    with world.fresh():
        world.ends_well(command, *first, *words, *needed)


names = st.sampled_from([*(o.partition(".")[2] or o for o in OPTIONS), "lr", "betas", "1"])
groups = st.dictionaries(names, values, max_size=4)


@fuzzed(
    st.one_of(
        st.dictionaries(st.sampled_from(["model", "train", "data", "preset", "resume"]), groups, max_size=3),
        st.fixed_dictionaries({"train": st.fixed_dictionaries({"optimizer_args": groups})}),
        st.dictionaries(texts, values, max_size=3),
    ),
    st.lists(st.tuples(st.integers(0, 400), texts), max_size=3),
)  # fmt: skip
def test_files_of_settings(world: World, content: dict[str, Any], edits: list[tuple[int, str]]) -> None:
    """Settings of the wrong types and names, and text that is written over what was YAML."""
    text = yaml.safe_dump(content, allow_unicode=True)
    for place, more in edits:
        text = text[:place] + more + text[place:]
    with world.fresh():
        Path("run.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
        world.ends_well(*RUN, "--config", "run.yaml", *BOUNDED)


def sum_up(folder: Path) -> None:
    """Write new checksums, as somebody would who forges a file."""
    (folder / SUMS).write_bytes(format_sums({p.name: digest(p) for p in folder.iterdir() if p.name != SUMS}))


def edit(path: Path, changes: dict[str, Any], inside: str | None = None) -> None:
    """Change keys of a JSON file, in the object ``inside`` if it is there."""
    content = json.loads(path.read_bytes())
    (content.setdefault(inside, {}) if inside else content).update(changes)
    path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")


sidecar_keys = st.sampled_from([*Sidecar.__dataclass_fields__, "more"])
splits = st.sampled_from(["train", "validation"])
booleans = st.booleans()


@fuzzed(st.dictionaries(sidecar_keys, values, min_size=1, max_size=3), splits, st.lists(damages, max_size=2), booleans)
def test_sidecars(world: World, changes: dict[str, Any], split: str, hits: list[Any], forged: bool) -> None:
    """What describes a token file, changed or damaged, with its old or new checksums."""
    with world.fresh():
        edit(Path("data", f"{split}.json"), changes)
        for hit in hits:
            damage(Path("data", f"{split}.json"), *hit)
        if forged:
            sum_up(Path("data"))
        world.ends_well(*RUN, *BOUNDED)
        world.ends_well("evaluate", "--checkpoint=run", "--data=data", f"--split={split}")


@fuzzed(splits, st.lists(damages, min_size=1, max_size=3), booleans)
def test_token_files(world: World, split: str, hits: list[Any], forged: bool) -> None:
    """Token files that are damaged, with a sidecar that says so or, forged, does not."""
    with world.fresh():
        path = Path("data", f"{split}.bin")
        for hit in hits:
            damage(path, *hit)
        if forged:
            sampled = sampled_checksum(path, FORMAT)
            edit(path.with_suffix(".json"), {"tokens": path.stat().st_size // 2, "sampled_checksum": sampled})
            sum_up(Path("data"))
        world.ends_well(*RUN, *BOUNDED)
        world.ends_well("evaluate", "--checkpoint=run", "--data=data", f"--split={split}")


FILES = ["config.json", "state.pt", "model.safetensors", SUMS]
model_keys = st.sampled_from([*GPTConfig.__dataclass_fields__, "more"])
state_keys = st.sampled_from(
    [(key,) for key in ("update", "optimizer", "optimizer_class", "precision", "stable_embedding")]
    + [("optimizer", "state"), ("optimizer", "param_groups"), ("optimizer", "state", 0), ("optimizer", "state", 1)]
    + [("optimizer", "state", 0, key) for key in ("exp_avg", "exp_avg_sq", "step")]
    + [("optimizer", "param_groups", 0, key) for key in ("params", "lr", "betas", "eps", "fused", "weight_decay")]
)
plain = st.one_of(values, st.sampled_from([torch.zeros(3), torch.zeros(16, 16, dtype=torch.int64), torch.ones(())]))


@fuzzed(
    st.sampled_from(FILES),
    st.lists(damages, max_size=2),
    st.dictionaries(model_keys, values, max_size=2),
    st.dictionaries(st.sampled_from(["model", "train", "tokenizer", "format", "end_of_document"]), values, max_size=1),
    st.lists(st.tuples(state_keys, plain), max_size=2),
    booleans,
)
def test_checkpoints(
    world: World, name: str, hits: list[Any], model: Any, more: Any, state: list[Any], forged: bool
) -> None:
    """Checkpoints that are damaged, and such as were made to look right."""
    with world.fresh():
        folder = Path("run", "step-00000002")
        if name == "config.json":
            edit(folder / name, model, "model")
            edit(folder / name, more)
        if name == "state.pt":
            content = torch.load(folder / name, weights_only=True)
            for keys, value in state:
                target = content
                with contextlib.suppress(LookupError, TypeError):  # an edit before took it away
                    for key in keys[:-1]:
                        target = target[key]
                    target[keys[-1]] = value
            torch.save(content, folder / name)
        for hit in hits:
            damage(folder / name, *hit)
        if forged:
            sum_up(folder)
        world.ends_well(*RUN, "--resume", str(folder), *BOUNDED, "--train.updates=4")
        world.ends_well("generate", "--checkpoint", str(folder), "--tokens=2")
        world.ends_well("export", "--checkpoint", str(folder), "--out=exported")


THEIRS = ["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"]
their_keys = st.one_of(
    st.sampled_from([name for name, _ in LLAMA.fields.values()]),
    st.sampled_from(["model_type", "rope_scaling", "eos_token_id", "head_dim", "hidden_act", "weight_map"]),
)


@fuzzed(st.sampled_from(THEIRS), st.lists(damages, max_size=2), st.dictionaries(their_keys, values, max_size=2))
def test_folders_of_transformers(world: World, name: str, hits: list[Any], changes: dict[str, Any]) -> None:
    """Models from elsewhere."""
    with world.fresh():
        path = Path("theirs", name)
        if name.endswith("index.json"):
            path.write_text("{}")
            os.remove("theirs/model.safetensors")
        if name.endswith(".json"):
            edit(path, changes)
        for hit in hits:
            damage(path, *hit)
        if world.ends_well("import", "--from=theirs", "--out=ours") == 0:
            world.ends_well("generate", "--checkpoint=ours", "--tokens=2")
