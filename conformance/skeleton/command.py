"""The command ``python -m conformance new-adapter``: run a script once, and write its adapter's skeleton."""

import argparse
import ast
import contextlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from conformance.auditing.run import audited, run_script
from conformance.errors import UsageError
from conformance.options import INTERRUPTED
from conformance.recipe import Recipe
from conformance.report.result import plain
from conformance.scripts import parsed
from conformance.skeleton.found import Found, found_in, shortened
from conformance.skeleton.names import Setting, likely_places, settings_of

UPDATES = 4
MOST = 20
"""Files that the skeleton names."""
MANY = 20_000
"""Files that are looked at in a folder; there may be a data set in it."""
NEEDED = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "microbatch_size", "updates", "lr")
"""Fields of the recipe without which no clause can be judged."""
WORDS = {"vocab_size": "the vocabulary", "block_size": "the length of sequences", "n_layer": "the number of layers"}
WORDS |= {"n_head": "the number of heads", "n_embd": "the width", "microbatch_size": "the size of a microbatch"}
WORDS |= {"updates": "the number of updates", "lr": "the learning rate"}
CLAIMS = {"microbatches": "microbatches", "clip": "clip", "dropout": "dropout"}
"""Capabilities that need one field of the recipe only."""


def new_adapter(options: argparse.Namespace) -> int:
    """Audit a script, write the skeleton of its adapter, and return the exit code.

    Raises:
        UsageError: for a user's mistake, or if the script makes no update.
    """
    script = Path(options.script)
    if not script.is_file():
        raise UsageError(f"no such script: {script}. Give the path of a Python file, and its arguments after --.")
    tree = parsed(script)
    stem = re.sub(r"\W", "_", script.stem)
    out = Path(options.out or f"{stem}_adapter.py")
    target = out.absolute()  # wherever the script goes from here
    check_out(target)
    began_with = f"Running {script} until it has made {UPDATES} updates, to see how it trains ..."
    print(plain(began_with), file=sys.stderr, flush=True)
    source, here, began = script.resolve(), Path.cwd(), time.time_ns()
    with opened() as paths:
        code, verdict = run_script([str(script), *options.arguments], partial(audited, UPDATES))
    if code == INTERRUPTED:
        return INTERRUPTED
    if code:
        raise UsageError(f"{script} ended with exit code {code}: run it by itself, and give its arguments after --.")
    facts = verdict.facts
    if verdict.broken:
        raise UsageError(f"the audit of {script} failed: {verdict.broken.strip().splitlines()[-1]}. Please report it.")
    if facts is None or not facts.updates:
        raise UsageError(
            f"{script} made no update that was seen: give it arguments after --, with which it trains in one process."
        )
    written, read = written_since(began, {here, source.parent}), read_only(paths, began, here, source)
    found = found_in(facts, len(facts.updates) < UPDATES, written, read)
    content = skeleton(script, tree, out, options.arguments, found)
    check_out(target)  # the script itself may have written it
    with target.open("x", encoding="utf-8") as file:
        file.write(content)
    print(plain(f"Written: {out}. Its questions are numbered; judge it now, and after each answer:"), file=sys.stderr)
    print(plain(f"  python -m conformance run --subject {shlex.quote(f'{out}:{class_name(stem)}')}"))
    return 0


def check_out(out: Path) -> None:
    """Raise UsageError if the file is there already or cannot become a module."""
    if os.path.lexists(out):
        raise UsageError(f"{out} is there already, and is not overwritten: name another file with --out.")
    if out.suffix != ".py" or not out.stem.isidentifier():
        raise UsageError(f"--out is {str(out)!r}: give a name that Python can import, such as my_adapter.py.")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder of --out, {out.absolute().parent}, is not there: make it first.")


def class_name(stem: str) -> str:
    """Return the name of the adapter's class: train_gpt becomes TrainGpt."""
    name = "".join(part[:1].upper() + part[1:] for part in stem.split("_"))
    return name if name.isidentifier() else f"Script{name}"


def written_since(began: int, folders: set[Path]) -> dict[str, int]:
    """Return the files below some folders that were written since a time (ns), with their sizes in bytes."""
    found: dict[str, int] = {}
    for folder in sorted(folders):
        for number, path in enumerate(files_below(folder)):
            if number >= MANY:
                break
            try:
                stat = path.stat()
            except OSError:
                continue
            if stat.st_mtime_ns >= began:
                found[str(path.relative_to(folder))] = stat.st_size
    return found


@contextlib.contextmanager
def opened() -> Iterator[list[str]]:
    """Yield a list of paths: the relative ones that Python opens for reading while the current folder is this one."""
    found: list[str] = []
    here, watching = os.getcwd(), True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:  # it stays for the life of the process
        if not watching or event != "open" or not isinstance(arguments[0], str) or arguments[1] not in ("r", "rb"):
            return
        if not os.path.isabs(arguments[0]) and os.getcwd() == here:
            found.append(os.path.normpath(arguments[0]))

    sys.addaudithook(hook)
    try:
        yield found
    finally:
        watching = False


def read_only(paths: Sequence[str], began: int, here: Path, script: Path) -> list[str]:
    """Return which of some relative paths are files older than a time (ns), other than the script.

    Args:
        paths: relative to ``here``. One that leads above it is left out: it cannot be linked into another folder.
        began: when the script began.
        here: the folder in which it began.
        script: its absolute path.
    """
    found = []
    for path in dict.fromkeys(paths):
        with contextlib.suppress(OSError):
            if path.startswith("..") or not path.isprintable() or os.path.samefile(here / path, script):
                continue
            if (here / path).stat().st_mtime_ns < began:
                found.append(path)
    return found[:MOST]


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, except hidden ones and what Python compiles."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(place, name)


def skeleton(script: Path, tree: ast.Module, out: Path, given: Sequence[str], found: Found) -> str:
    """Return the text of the adapter.

    Args:
        script: that was audited.
        tree: its syntax.
        out: the file that the adapter will be.
        given: the script's arguments in the audit.
        found: in the audit.
    """
    names, flags = settings_of(tree, found.seen)
    # A name that holds what argparse has read would be set twice: an option goes before it.
    names = [name for name in names if name.field not in {flag.field for flag in flags}]
    mapped = {setting.field for setting in (*names, *flags)}
    claims = [found.shape] if found.shape else []
    claims += [c for c, field in CLAIMS.items() if field in mapped and has(found, c)]
    kinds = sorted({kind.partition("(")[0] for kind in found.initial.values()}) or ["Normal"]
    recipe, script_name = Recipe(), shortened(script.name)
    unset = [field for field in NEEDED if field not in mapped]
    fixed_clip = has(found, "clip") and "clip" not in mapped
    questions = [*["clip"] * fixed_clip, *["schedule"] * (not found.constant_rate), "claims", "files", "initial"]
    template = environment().get_template("adapter.py.jinja")
    return template.render(
        script=script_name,
        stem=shortened(script.stem),
        out=out.name,
        path=place_of(script, out),
        name=class_name(re.sub(r"\W", "_", script.stem)),
        found=found,
        facts=list(described(found)),
        q={name: number for number, name in enumerate(questions, start=3)},
        sizes_of_recipe=f"{recipe.n_layer} layers, {recipe.n_head} heads and width {recipe.n_embd}",
        imports=", ".join([*sorted({"NotApplicable", "Recipe", "TensorInfo", *kinds}), "everything_but"]),
        kinds=" | ".join(kinds),
        names=names,
        flags=flags,
        given=[json.dumps(word) for word in left_over(given, flags)],
        unset=", ".join(WORDS[field] for field in unset),
        likely=likely_places(tree, unset, found.seen),
        claims=claims,
        fixed_clip=fixed_clip,
        reads=[json.dumps(path) for path in found.reads],
        hints=list(hints(script_name, found, mapped)),
        lacking=lacking(script_name, found, mapped),
    )


def place_of(script: Path, out: Path) -> str:
    """Return the path of the script as code: relative to the adapter where it lies beside or below it."""
    try:
        return f"Path(__file__).parent / {json.dumps(str(script.resolve().relative_to(out.resolve().parent)))}"
    except ValueError:
        return f"Path({json.dumps(str(script.resolve()))})"


def environment() -> Environment:
    """Return where templates come from. No autoescape: what they make is Python."""
    loader = PackageLoader("conformance.skeleton", "templates")
    return Environment(  # not a page
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )


def left_over(given: Sequence[str], flags: Sequence[Setting]) -> list[str]:
    """Return the arguments of the audited run that the adapter does not set."""
    ours, kept, skip = {flag.name for flag in flags}, list[str](), False
    for word in given:
        if skip and not word.startswith("--"):
            skip = False
            continue
        skip = word in ours
        if not skip and word.partition("=")[0] not in ours:
            kept.append(word)
    return kept


def has(found: Found, capability: str) -> bool:
    """Return True if the audit saw the script do it."""
    seen = {"microbatches": found.seen.get("microbatches", 1) > 1, "clip": bool(found.clips), "dropout": found.dropout}
    return seen[capability]


def described(found: Found) -> Iterator[tuple[str, str]]:
    """Yield what the audit saw, as labels and words."""
    seen = found.seen
    yield "model", f"{found.model}, {found.sizes}{', head tied to the embedding' if found.tied else ''}"
    sizes = {"vocabulary": "vocab_size", "width": "n_embd", "layers": "n_layer", "tokens per sequence": "block_size"}
    yield "sizes", ", ".join(f"{word} {seen[field]}" for word, field in sizes.items() if field in seen)
    yield "optimizer", " and ".join(found.optimizers) or "not seen"
    yield "groups", "; ".join(found.groups) or "not seen"
    yield "precision", f"{found.precision}, on {found.device}"
    rows = f" of {seen['microbatch_size']} sequences" if "microbatch_size" in seen else ""
    yield "microbatches per update", f"{seen.get('microbatches', 'not seen')}{rows}"
    yield "clipping", found.clips or "none seen"
    yield "learning rates", f"{found.rates}{' (constant)' if found.constant_rate else ''}"
    yield "dropout", "yes" if found.dropout else "no"
    yield "evaluates", "yes" if found.evaluates else "not in these updates"
    yield "files read", ", ".join(map(shortened, found.reads[:5])) or "none by a relative path"
    yield "seed", f"{found.seed}" if found.seed is not None else "not seen"
    yield "loop", f"it ended after {found.updates} updates" if found.ended else f"more than {found.updates} updates"
    yield "printed", " | ".join(found.said) or "nothing"
    more = f"; {found.checkpoint} looks like a checkpoint" if found.checkpoint else ""
    yield "files written", (", ".join(found.files[:5]) or "none in these updates") + more


def hints(script: str, found: Found, mapped: set[str]) -> Iterator[str]:
    """Yield what a script seems to do and the adapter does not claim, as capabilities."""
    for capability, field in CLAIMS.items():
        if has(found, capability) and field not in mapped and capability != "clip":  # a question of its own
            yield f'"{capability}": seen, but no name or option of {script} was found that sets it'
    if not found.constant_rate:
        yield '"schedule": the learning rate changes from update to update (recipe.warmup, recipe.minimum_lr)'
    if found.evaluates:
        yield '"evaluate", "evaluate-every": it evaluates (recipe.validation_batches(), recipe.evaluate_every)'
        yield '"final-evaluation": if it evaluates after the last update, too, whatever the interval'
        yield '"evaluate-batches", "ignored-validation": if it can (recipe.evaluate_batches, validation_labels())'
    name = Path(found.checkpoint).name if found.checkpoint else "ckpt.pt"
    saw = f"it wrote {found.checkpoint}" if found.checkpoint else "if it saves and resumes"
    yield f'"resume", "load": {saw} (recipe.save_every, recipe.resume.find("{name}"), and a method load())'
    if found.tied:
        yield '"tied": the head shares the weight of the embedding; claim it if recipe.tied can choose'
    if "autocast" in found.precision:
        yield '"bf16-mixed", "16-mixed": it has autocast (recipe.precision)'
    yield '"initial-std", "grouped-query", "rotary-base", "norm-eps": if its model has such a setting'
    yield '"cooldown", "keep-last", "decay-all": if it has such a setting'
    yield '"finds-newest": if it can find the newest checkpoint in a directory by itself (recipe.find_newest)'
    yield '"two-ranks": if torchrun can start it on the CPU (recipe.batches(rank), recipe.world_size)'


def lacking(script: str, found: Found, mapped: set[str]) -> dict[str, str]:
    """Return what nearly every stack has and this one does not seem to have, with reasons as code."""
    made = " and ".join(found.optimizers) or "its own optimizer"
    reasons = {
        "any-optimizer": f"{script} makes {made} itself",
        "keywords": f"{script} sets the arguments of {made} itself",
    }
    if "seed" not in mapped:
        reasons["seed"] = f"no name or option of {script} was found that sets the seed"
    return reasons
