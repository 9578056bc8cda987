"""Which names at a script's top level, and which of its options, set a field of the recipe: by their usual names.

A guess by name counts only if its value is what the audit saw, where it saw one. The skeleton shows every guess beside
the value, for its reader to check.
"""

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

USUAL = {
    "vocab_size": "vocab vocabsize vocabulary nvocab ntokens",
    "block_size": "block blocksize context contextlength contextsize seqlen seqlength sequencelength length maxlength"
    " maxlen maxseqlen npositions ctxlen blocklength T",
    "n_layer": "nlayer nlayers layers layer depth numlayers numhiddenlayers",
    "n_head": "nhead nheads heads head numheads numattentionheads",
    "n_embd": "nembd nembed dim width dmodel hidden hiddensize embedding embeddim embdim modeldim",
    "microbatch_size": "batch batchsize bs microbatchsize devicebatchsize perdevicetrainbatchsize",
    "microbatches": "gradientaccumulationsteps gradaccumsteps accumulationsteps accumsteps gradaccum accumulate"
    " accumulation accumulategradbatches microbatches",
    "updates": "maxiters maxsteps steps numsteps iterations numiterations iters updates trainsteps"
    " trainingsteps niters",
    "lr": "lr learningrate maxlr peaklr peak baselr rate",
    "weight_decay": "weightdecay wd decay",
    "clip": "gradclip clip maxgradnorm clipnorm gradientclipval maxnorm clipgrad",
    "dropout": "dropout pdrop dropoutp",
    "warmup": "warmup warmupiters warmupsteps warmupupdates",
    "minimum_lr": "minlr minlearningrate",
    "seed": "seed randomseed",
}
"""Names as scripts write them, without case and separators, for each field."""
FIELDS = {name: field for field, names in USUAL.items() for name in names.lower().split()}
NO_NUMBERS = (
    ast.List,
    ast.Tuple,
    ast.Set,
    ast.Dict,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.Lambda,
)
"""Expressions whose values set no field: ``decay = [p for p in ...]`` is a list of tensors."""
VALUES = {
    "lr": "recipe.optimizer.rate",
    "weight_decay": 'dict(recipe.optimizer.arguments).get("weight_decay", 0.0)',
    "clip": "recipe.clip or 1e9",
    "minimum_lr": "recipe.optimizer.rate if recipe.minimum_lr is None else recipe.minimum_lr",
}
"""What an adapter writes for a field; for the others, ``recipe.FIELD``."""


@dataclass(frozen=True)
class Setting:
    """A place in a script that sets a field of the recipe."""

    name: str
    """At the top level, or the option, such as ``--lr``."""
    field: str
    value: Any
    """In the script; None if it is not written there as a plain value."""

    @property
    def code(self) -> str:
        """What the adapter gives instead."""
        return VALUES.get(self.field, f"recipe.{self.field}")

    @property
    def note(self) -> str:
        """The value in the script, as a comment."""
        return "" if self.value is None else f"  # {self.value}"


def plain(name: str) -> str:
    """Return a name without case and separators."""
    return name.lower().replace("_", "").replace("-", "")


def settings_of(tree: ast.Module, seen: Mapping[str, Any]) -> tuple[list[Setting], list[Setting]]:
    """Return the names at the top level and the options of a script that set a field, one of each for a field.

    Args:
        tree: of the script.
        seen: by field, what the audit saw; a guess with another value does not count.
    """
    by_name = [
        Setting(name, FIELDS[plain(name)], literal(value))
        for name, value in constants(tree)
        if plain(name) in FIELDS and not isinstance(value, NO_NUMBERS)
    ]
    by_option = [Setting(n, FIELDS[plain(n[2:])], value) for n, value in options(tree) if plain(n[2:]) in FIELDS]
    return first_of_each(by_name, seen), first_of_each(by_option, seen)


def first_of_each(settings: list[Setting], seen: Mapping[str, Any]) -> list[Setting]:
    """Return the first setting of each field whose value agrees with what was seen."""
    found: dict[str, Setting] = {}
    for setting in settings:
        wanted = seen.get(setting.field)
        if setting.value is None or wanted is None or agrees(setting.value, wanted):
            found.setdefault(setting.field, setting)
    return list(found.values())


def agrees(value: Any, wanted: Any) -> bool:
    """Return True if a value of the script is the one that was seen."""
    return isinstance(value, int | float) and abs(value - wanted) <= 1e-6 * abs(wanted)


def constants(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Yield names that get a value at the top level, also several at once, and the expressions of those values."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, value = statement.targets[0], statement.value
            if isinstance(target, ast.Name):
                yield target.id, value
            elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
                for part, its in zip(target.elts, value.elts, strict=True):
                    if isinstance(part, ast.Name):
                        yield part.id, its
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            yield statement.target.id, statement.value


def options(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Yield the long options that a script gives to argparse, or to what is called like it, and their defaults."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            default = next((literal(word.value) for word in node.keywords if word.arg == "default"), None)
            for argument in node.args:
                name = literal(argument)
                if isinstance(name, str) and name.startswith("--"):
                    yield name, default


def likely_places(tree: ast.Module, fields: Collection[str], seen: Mapping[str, Any]) -> list[str]:
    """Return where a script, inside its functions and calls, seems to set some fields: for a comment."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        named = list[tuple[str, ast.expr]]()
        if isinstance(node, ast.Call):
            named = [(word.arg, word.value) for word in node.keywords if word.arg]
        elif isinstance(node, ast.FunctionDef):
            arguments = node.args.args[-len(node.args.defaults) :] if node.args.defaults else []
            named = [(argument.arg, value) for argument, value in zip(arguments, node.args.defaults, strict=True)]
        for name, value in named:
            setting = Setting(name, FIELDS.get(plain(name), ""), literal(value))
            if setting.field in fields and setting.value is not None and first_of_each([setting], seen):
                found.setdefault(setting.field, f"line {value.lineno}: {name}={setting.value} -> {setting.code}")
    return [found[field] for field in fields if field in found]


def literal(node: ast.expr) -> Any:
    """Return the value of a plain expression, or None."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
