"""A subject: the training stack under test, seen through an adapter of some forty lines."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from conformance.recipe import Recipe
    from conformance.recording.trace import TensorInfo

CAPABILITIES = {
    "llama-shape": "trains a model with RMSNorm, SwiGLU and no biases",
    "gpt-shape": "trains a model with LayerNorm, a GELU MLP and biases",
    "tied": "can share the embedding's weight with the head",
    "foreign-module": "trains any module that maps token ids (B, T) to logits (B, T, V)",
    "microbatches": "accumulates the gradients of several microbatches into an update",
    "batch-total": "is told how many sequences an update has, and finds the number of microbatches by itself",
    "ignored-targets": "takes targets of -100, which are not to be predicted",
    "clip": "clips the global norm of the gradients",
    "schedule": "warms the learning rate up and takes it down by a cosine",
    "dropout": "has a model with dropout",
    "sampler": "shuffles a data set by itself: in every epoch each sample once",
    "fused": "asks for the optimizer's fused kernel on the device of the run",
    "ndim-policy": "can be told to decay tensors of two and more dimensions only",
    "resume": "goes on from a checkpoint that it wrote",
    "evaluate": "evaluates on validation data after the last update",
    "evaluate-every": "evaluates during training too, every so many updates",
    "load": "has load(checkpoint), which gives back a plain eager module",
    "bf16-mixed": "computes in bfloat16 with float32 weights",
    "bf16-true": "keeps weights in bfloat16",
    "16-mixed": "computes in float16 with float32 weights",
    "logits-opt-out": "can be told to leave logits in the dtype they were computed in",
    "stable-embedding": "can train with bitsandbytes' StableEmbedding",
    "meta-init": "can build the model on the meta device and materialise it afterwards, on one device",
    "activation-checkpointing": "can compute activations again in the backward instead of keeping them",
    "compile": "has torch.compile as an option",
    "two-ranks": "trains on two CPU processes with gloo",
}
"""What a stack may lack, and what each name means. Everything that is not in a subject's ``lacks`` is claimed."""


def everything_but(*claimed: str, reason: str) -> dict[str, str]:
    """``lacks`` for a stack that has little: every capability but the claimed ones, all with one reason.

    Raises:
        ValueError: if a claimed capability does not exist.
    """
    unknown = set(claimed) - set(CAPABILITIES)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is no capability: choose from {', '.join(CAPABILITIES)}")
    return {name: reason for name in CAPABILITIES if name not in claimed}


BUILT_IN = {
    "reference": "conformance.subjects.reference:Reference",
    "litgpt": "conformance.subjects.litgpt:LitGPT",
    "transformers": "conformance.subjects.transformers:Transformers",
    "x-transformers": "conformance.subjects.x_transformers:XTransformers",
}


class UsageError(Exception):
    """A mistake in how the suite was called. The message is one sentence for the user; no traceback, exit code 2."""


@dataclass(frozen=True)
class Normal:
    """Drawn from a normal distribution."""

    mean: float
    std: float


@dataclass(frozen=True)
class Uniform:
    """Drawn from a uniform distribution on [low, high)."""

    low: float
    high: float


@dataclass(frozen=True)
class Constant:
    """Every element has this value."""

    value: float


Distribution = Normal | Uniform | Constant


class Policy(Protocol):
    """What the stack itself declares, from its documentation or design. The suite judges against nothing else."""

    def initial(self, recipe: "Recipe", tensor: "TensorInfo") -> Distribution:
        """The distribution that a parameter of the stack's own model starts from."""

    def decays(self, recipe: "Recipe", tensor: "TensorInfo") -> bool:
        """Whether weight decay acts on a parameter."""

    def learning_rate(self, recipe: "Recipe", update: int) -> float:
        """The learning rate of update ``update``, counted from 0."""


class Subject(Protocol):
    """The adapter. ``load(checkpoint) -> nn.Module`` may be added; without it ``lacks`` must name ``load``."""

    @property
    def name(self) -> str:
        """Of the stack, as its users call it. (A plain attribute does, here and below.)"""

    @property
    def version(self) -> str:
        """Of the stack, not of the adapter."""

    @property
    def lacks(self) -> Mapping[str, str]:
        """Capabilities that the stack does not have, each with a reason that can be checked in its source."""

    @property
    def policy(self) -> Policy:
        """What the stack declares."""

    def train(self, recipe: "Recipe") -> None:
        """Run the stack's own entry point on the recipe, to the end."""


def load_subject(spec: str) -> Subject:
    """The subject that ``spec`` names: ``reference``, ``litgpt``, or ``package.module:Attribute``.

    The attribute is an adapter class, which is called without arguments, or an adapter.

    Raises:
        UsageError: if there is no such thing, or it is no Subject.
    """
    path = BUILT_IN.get(spec, spec)
    module_name, colon, attribute = path.partition(":")
    if not colon:
        raise UsageError(
            f"there is no subject {spec!r}: give one of {', '.join(sorted(BUILT_IN))}, or module:Attribute."
        )
    if os.getcwd() not in sys.path:  # as `python -m` has it: an adapter is often a file beside the user
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"the subject {spec!r} cannot be imported: {describe_error(error)}. {install_hint(spec, error)}"
        ) from error
    except (Exception, SystemExit) as error:  # a script that is imported may parse a command line and quit
        raise UsageError(f"importing the subject {spec!r} raised {describe_error(error)}.") from error
    found = getattr(module, attribute, None)
    if found is None:
        raise UsageError(f"the module {module_name} has no attribute {attribute!r} to be the subject.")
    try:
        subject = found() if isinstance(found, type) else found
    except (Exception, SystemExit) as error:
        raise UsageError(f"making the subject {spec!r} raised {describe_error(error)}.") from error
    check_subject(subject, spec)
    return subject  # type: ignore[no-any-return] # check_subject has looked


def describe_error(error: BaseException) -> str:
    """An exception in one line: its class and the first line of its message, with the next behind a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])  # load_state_dict() begins with one
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def install_hint(spec: str, error: ImportError) -> str:
    """What to do about a failed import."""
    if spec in BUILT_IN and error.name and not error.name.startswith("conformance"):
        return f"Install it with: pip install 'gpt-conformance[{spec}]'."
    return "Correct the path, or install what it needs."


def check_subject(subject: Any, spec: str) -> None:
    """Raise UsageError if an object does not have what a Subject needs, or lacks what does not exist."""
    for attribute, kind in (("name", str), ("version", str), ("lacks", Mapping)):
        if not isinstance(getattr(subject, attribute, None), kind):
            raise UsageError(f"{spec!r} is no Subject: it needs an attribute {attribute!r} of type {kind.__name__}.")
    for owner, method in ((subject, "train"), *((getattr(subject, "policy", None), m) for m in POLICY_METHODS)):
        if not callable(getattr(owner, method, None)):
            where = "" if owner is subject else "policy."
            raise UsageError(f"{spec!r} is no Subject: it needs a method {where}{method}().")
    for capability, reason in subject.lacks.items():
        if capability not in CAPABILITIES:
            raise UsageError(
                f"{spec!r} lacks {capability!r}, which is no capability: choose from {', '.join(CAPABILITIES)}."
            )
        if not isinstance(reason, str) or not reason.strip():
            raise UsageError(f"{spec!r} lacks {capability!r} without a reason: give one that can be checked.")
    if not callable(getattr(subject, "load", None)) and "load" not in subject.lacks:
        raise UsageError(f"{spec!r} has no method load(): add it, or name 'load' in lacks, with a reason.")


POLICY_METHODS = ("initial", "decays", "learning_rate")
