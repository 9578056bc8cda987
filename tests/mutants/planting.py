"""How a fault is planted: text is replaced in one function of the running reference, and put back."""

import importlib
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any


@dataclass(frozen=True)
class Edit:
    """Replace ``old`` by ``new`` in the source of one function, ``module:qualified.name``."""

    function: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """The reference with one fault."""

    name: str
    killers: tuple[str, ...]
    """Clauses that must fail on it."""
    published: str
    """Where the fault was seen."""
    edits: tuple[Edit, ...]


def resolve(path: str) -> FunctionType:
    """The plain function behind ``module:qualified.name``, without its decorators."""
    module_name, _, qualified = path.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in qualified.split("."):
        found = getattr(found, part)
    function = inspect.unwrap(found)
    assert isinstance(function, FunctionType)
    return function


@contextmanager
def planted(edits: tuple[Edit, ...]) -> Iterator[None]:
    """Apply edits to the running program, and take them back.

    The code object is exchanged, so that every name under which the function was imported sees the fault.

    Raises:
        ValueError: if the text to replace is not there exactly once: the reference has changed, so must the mutant.
    """
    with ExitStack() as stack:
        for path in dict.fromkeys(edit.function for edit in edits):
            function = resolve(path)
            stack.callback(setattr, function, "__code__", function.__code__)
            function.__code__ = edited_code(function, [edit for edit in edits if edit.function == path])
        yield


def edited_code(function: FunctionType, edits: Sequence[Edit]) -> Any:
    """The code object of the function with edits, all of this function."""
    source = textwrap.dedent(inspect.getsource(function))
    for edit in edits:
        if source.count(edit.old) != 1:
            raise ValueError(f"{edit.old!r} stands {source.count(edit.old)} times in {edit.function}, not once")
        source = source.replace(edit.old, edit.new)
    namespace: dict[str, Any] = {}
    # Registered code of this repository, from the table below; nothing from outside.
    exec(
        compile(source, f"<mutant of {edit.function}>", "exec"),
        function.__globals__,
        namespace,
    )
    code = inspect.unwrap(namespace[function.__name__]).__code__
    if code.co_freevars != function.__code__.co_freevars:
        raise ValueError(f"{edit.function} closes over {function.__code__.co_freevars}; edit another function")
    return code


FIT, SETUP = "reference.training.trainer:Trainer.fit", "reference.training.setup:set_up"
BUILD_MODULE, UPDATE = "reference.training.setup:build_module", "reference.training.run:Run.update_once"
BUILD, ADDED = "reference.optimizers.build:create_one", "reference.optimizers.build:added_keywords"
GROUPS, DECAYED = "reference.optimizers.decay:decay_groups", "reference.optimizers.decay:is_decayed"
DRAW, STD = "reference.model.initialization:draw", "reference.model.initialization:declared_std"
LAUNCH, RESTORE = "reference.training.launch:launch", "reference.training.saving:restore"
# load_model() is these words and nothing else.
LOAD, PUT = "reference.checkpoint.folder:load_model", "put_into(model, load_weights(folder), folder / WEIGHTS)"
PREPARE = "reference.finetuning.prepare:prepare"
EVALUATE = "reference.training.evaluation:evaluate"
PEAKS = 'peaks = [float(group["lr"]) for group in bare.param_groups]'
RATE = "learning_rate(config, update, peak)"  # in UPDATE


def mutant(name: str, killers: str, published: str, *edits: tuple[str, str, str]) -> Mutant:
    """A row of a chapter's table; ``killers`` are clause ids with spaces between."""
    return Mutant(name, tuple(killers.split()), published, tuple(Edit(*edit) for edit in edits))
