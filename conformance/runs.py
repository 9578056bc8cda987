"""What a clause may ask for: runs of the subject, each made once and kept, and what the subject declares."""

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast, get_args

from conformance.blame import raised_by_adapter
from conformance.capabilities import CAPABILITIES
from conformance.errors import (
    REFUSED,
    AdapterFailed,
    ConformanceError,
    NotApplicable,
    RunEnded,
    RunFailed,
    RunTimeout,
    describe_error,
)
from conformance.recipe import PRECISIONS, SHAPES, Precision, Recipe, Shape
from conformance.recording import record
from conformance.recording.limits import no_sudden_exit, time_limit
from conformance.recording.trace import Checkpoint, TensorInfo, Trace
from conformance.subject import Distribution, Leftovers, Loads, Place, Setting, Subject, Winner
from conformance.unread import watched
from conformance.version import is_newer

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
W = TypeVar("W", bound=str)
TIMEOUT = 120.0  # seconds; a healthy run of the suite takes less than one, after its imports


@dataclass(frozen=True)
class Attempt:
    """A run that was allowed to fail."""

    trace: Trace
    """What was recorded until then."""
    error: BaseException | None
    """What the stack raised; None if the run ended."""


class Runs:
    """The runs of one subject. Use as a context manager: they write into a folder that is removed at the end."""

    def __init__(self, subject: Subject, timeout: float | None = TIMEOUT) -> None:
        """Make no run yet.

        Args:
            subject: to run.
            timeout: seconds that a run may take; None: as long as it wants.
        """
        self.subject, self.timeout = subject, timeout
        self.policy = Declared(subject)
        self.as_of: str | None = getattr(subject, "as_of", None)
        self.lacks = dict(subject.lacks)  # as it is now: a run cannot take back what the subject claims
        for name, capability in CAPABILITIES.items():
            if is_newer(capability.since, self.as_of) and not capability.implied:
                self.lacks.setdefault(name, newer(capability.since, self.as_of))
        self.directory = Path(tempfile.mkdtemp(prefix="conformance-"))
        self._attempts: dict[Recipe, Attempt] = {}
        self._groups: dict[Recipe, list[Trace]] = {}
        self._read: dict[Recipe, set[str]] = {}

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what the runs wrote."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def asks(self, since: str) -> bool:
        """Return whether a part that was added to a clause in version ``since`` ("0.2") is asked of this subject.

        An adapter that declares an older ``as_of`` is judged as that version judged it.
        """
        return not is_newer(since, self.as_of)

    def has(self, capability: str) -> bool:
        """Return True if the subject claims a capability."""
        assert capability in CAPABILITIES, capability
        return capability not in self.lacks

    def shapes(self) -> list[Shape]:
        """Return the model shapes that the subject claims."""
        return [shape for shape in SHAPES if self.has(f"{shape}-shape")]

    def precisions(self) -> list[Precision]:
        """Return the precisions that the subject claims; every stack has float32."""
        return [name for name in PRECISIONS if name == "32-true" or self.has(name)]

    def trace(self, recipe: Recipe) -> Trace:
        """Return the trace of a run that must end.

        Raises:
            RunFailed: if it did not, or nothing was seen in it.
        """
        attempt = self.attempt(recipe)
        if attempt.error is not None:
            reason = describe_error(attempt.error)
            if isinstance(attempt.error, SystemExit) and attempt.trace.messages:
                reason += f", after {attempt.trace.messages[-1].strip()!r}"  # argparse, say, prints why it quits
            raise RunFailed(reason) from attempt.error
        self.require_seen(recipe, attempt.trace)
        self.require_optimizer(recipe, attempt.trace)
        return attempt.trace

    def require_read(self, recipe: Recipe, field: str, capability: str) -> None:
        """Raise NotApplicable if the adapter has read no such field in the run of a recipe: it does not know it."""
        if field not in self._read.get(recipe, ()):
            raise NotApplicable(
                f"the adapter does not read Recipe.{field}: map it, or name {capability} in lacks, with a reason"
            )

    def require_optimizer(self, recipe: Recipe, trace: Trace) -> None:
        """Raise NotApplicable if an optimizer other than the one asked for has stepped: it must not be judged."""
        asked = recipe.optimizer.class_path.rpartition(".")[2]
        steps = [step.optimizer for update in trace.updates for step in update.steps]
        # bitsandbytes' PagedAdamW is its AdamW with a state that the CPU's memory may hold: LitGPT takes it where it
        # quantises.
        used = [{name.removeprefix("Paged") for name in names(step)} for step in steps]
        if self.has("any-optimizer") and all(steps) and not any(asked.removeprefix("Paged") in each for each in used):
            raise NotApplicable(
                f"the run used {names(steps[0])[0]}, although the recipe asked for {asked}: if the stack fixes its "
                "optimizer, the adapter must name any-optimizer in lacks"
            )

    def require_seen(self, recipe: Recipe, trace: Trace) -> None:
        """Raise AdapterFailed if a run has ended without any training."""
        if not trace.updates or not trace.tensors:
            seen = f"{len(trace.forwards)} calls of a model with token ids and {len(trace.updates)} updates"
            why = " ".join(["it must run your stack's own entry point.", *trace.notes])
            if recipe.resume is not None:
                why = "it must go on from the checkpoint that it is given, Recipe.resume, to Recipe.updates in all."
            raise AdapterFailed(f"{type(self.subject).__name__}.train() ended, but the suite saw {seen}: {why}")

    def start(self, recipe: Recipe) -> Trace:
        """Return the trace of a run that must get as far as its first forward; what happens later does not matter.

        Raises:
            RunFailed: if it did not.
        """
        attempt = self.attempt(recipe)
        return attempt.trace if attempt.trace.tensors else self.trace(recipe)

    def attempt(self, recipe: Recipe) -> Attempt:
        """Run a recipe that the stack may refuse, or return the earlier run of an equal one.

        Raises:
            AdapterFailed: if the adapter's own code raised.
            NotApplicable: if the adapter said that the stack refuses such a recipe by design.
            RunFailed: if the run took too long.
        """
        if recipe not in self._attempts:
            folder, keep = self.folders()
            nan, dropping = recipe.nan_gradient, recipe.dropping
            with record(folder, recipe.zero_gradients, nan_gradient=nan, keep=keep, dropping=dropping) as trace:
                error = self.train(recipe, folder)
            self._attempts[recipe] = Attempt(trace, error)
        return self.excused(self._attempts[recipe])

    def folders(self) -> tuple[Path, Path]:
        """Return a new folder for a run, and the path of another for copies of its files."""
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=self.directory))
        return folder, folder.with_name(folder.name.replace("run-", "kept-"))

    def train(self, recipe: Recipe, folder: Path) -> BaseException | None:
        """Let the subject train, and return what it raised."""
        try:
            with time_limit(self.timeout), no_sudden_exit():
                self.subject.train(watched(recipe, folder, self._read.setdefault(recipe, set())))
        except KeyboardInterrupt:
            raise
        except BaseException as raised:  # SystemExit too: a stack that quits has not trained
            return raised
        return None

    def excused(self, attempt: Attempt) -> Attempt:
        """Return an attempt, unless what it raised is no outcome of the stack: see :meth:`attempt`."""
        if isinstance(attempt.error, RunTimeout | RunEnded):
            raise RunFailed(str(attempt.error)) from attempt.error
        if isinstance(attempt.error, NotApplicable):
            if attempt.trace.updates:
                raise AdapterFailed(
                    f"train() raised NotApplicable after {len(attempt.trace.updates)} updates: it must do so before it "
                    "trains"
                ) from attempt.error
            raise NotApplicable(f"{REFUSED}{attempt.error}")
        if attempt.error is not None and raised_by_adapter(attempt.error, self.subject):
            raise AdapterFailed(describe_error(attempt.error)) from attempt.error
        return attempt

    def compiled(self, recipe: Recipe) -> Trace:
        """Return the trace of a run that torch.compile really compiled. It holds nothing but what the run has written.

        Raises:
            RunFailed: if the run did not end.
        """
        from conformance.recording.compiled import compiling
        from conformance.recording.files import Files
        from conformance.recording.isolation import collected_messages

        folder, keep = self.folders()
        files, trace = Files(folder, keep), Trace()
        with compiling(), collected_messages(trace.messages):  # a warning, too: pytest may make it an error
            attempt = Attempt(trace, self.train(dataclasses.replace(recipe, compile=True), folder))
        self.excused(attempt)
        if attempt.error is not None:
            raise RunFailed(describe_error(attempt.error)) from attempt.error
        files.credit(attempt.trace, recipe.updates)
        return attempt.trace

    def ranks(self, recipe: Recipe) -> list[Trace]:
        """Return the traces of all ranks of a run on several processes.

        Raises:
            NotApplicable: if the adapter said on a rank that the stack refuses such a recipe by design.
            RunFailed: if a rank raised something else.
        """
        from conformance.recording.ranks import run_on_ranks

        if recipe not in self._groups:
            folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=self.directory))
            self._groups[recipe] = run_on_ranks(self.subject, recipe, folder)
        return self._groups[recipe]

    def load(self, checkpoint: Checkpoint) -> "nn.Module":
        """Return the plain eager module in a checkpoint, for a clause that needs the capability ``load``."""
        from conformance.recording.isolation import quiet_and_deterministic

        assert isinstance(self.subject, Loads), "a clause that loads names 'load' in its needs"
        with quiet_and_deterministic():
            return self.subject.load(checkpoint)


def names(class_paths: tuple[str, ...]) -> list[str]:
    """Return the last parts of class paths."""
    return [path.rpartition(".")[2] for path in class_paths]


class Declared:
    """What a subject declares, checked: if a policy raises, or returns nonsense, that is the adapter's fault."""

    def __init__(self, subject: Subject) -> None:
        self.policy = subject.policy

    def initial(self, recipe: Recipe, tensor: TensorInfo) -> Distribution:
        """Return the distribution that a parameter starts from."""
        found = asked(lambda: self.policy.initial(recipe, tensor))
        numbers = vars(found).values() if isinstance(found, Distribution) else [math.nan]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise AdapterFailed(
                f"policy.initial() returned {found!r} for {tensor.name}: it must return a Normal, TruncatedNormal, "
                "Uniform or Constant of finite numbers"
            )
        return found

    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        """Return True if weight decay acts on a parameter."""
        return bool(asked(lambda: self.policy.decays(recipe, tensor)))

    def learning_rate(self, recipe: Recipe, update: int) -> float:
        """Return the learning rate of an update, counted from 0."""
        return finite(asked(lambda: float(self.policy.learning_rate(recipe, update))), "learning_rate", update)

    def rate(self, recipe: Recipe, update: int, tensor: TensorInfo) -> float:
        """Return the learning rate of a tensor in an update: where the policy has no rate(), that of the update."""
        word = getattr(self.policy, "rate", None)
        if word is None:
            return self.learning_rate(recipe, update)
        return finite(asked(lambda: float(word(recipe, update, tensor))), "rate", update)

    def owner(self, recipe: Recipe, tensor: TensorInfo) -> str | None:
        """Return the class path of the optimizer that owns a tensor; None: any."""
        return self.word("owner", None, str, recipe, tensor)

    def auxiliary_loss(self, recipe: Recipe) -> bool:
        """Return True if the loss has terms besides the cross entropy."""
        return bool(self.word("auxiliary_loss", False, bool, recipe))

    def context(self, recipe: Recipe) -> int | None:
        """Return how many tokens back a logit looks, its own included; None: to the first."""
        return self.word("context", None, int, recipe)

    def document_end(self, recipe: Recipe) -> int | None:
        """Return the id that ends a document, if a token does not see the documents before its own; None: it does."""
        return self.word("document_end", None, int, recipe)

    def leftovers(self, recipe: Recipe, place: Place) -> Leftovers:
        """Return what happens to leftovers. Raises NotApplicable if the policy does not say."""
        found: Leftovers | None = self.word("leftovers", None, str, recipe, place)
        return self.one_of(found, "leftovers", place, get_args(Leftovers))

    def wins_on_resume(self, recipe: Recipe, setting: Setting) -> Winner:
        """Return whose setting is used after a resume. Raises NotApplicable if the policy does not say."""
        found: Winner | None = self.word("wins_on_resume", None, str, recipe, setting)
        return self.one_of(found, "wins_on_resume", setting, get_args(Winner))

    def one_of(self, found: W | None, name: str, asked_for: str, known: tuple[str, ...]) -> W:
        """Return a word of the policy's, checked. Raises NotApplicable if the policy does not say it."""
        if found is None:
            raise NotApplicable(f"the policy does not declare {name}() for {asked_for!r}")
        if found not in known:
            raise AdapterFailed(
                f"policy.{name}() returned {found!r} for {asked_for!r}: choose from {', '.join(known)}, or None"
            )
        return found

    def logits(
        self,
        recipe: Recipe,
        weights: "Mapping[str, Tensor]",
        ids: "Tensor",
        drop: "Callable[[Tensor], Tensor] | None" = None,
    ) -> "Tensor":
        """Return the declared logits: in training, if it is given what drops activations.

        Raises:
            NotApplicable: if the policy does not declare them.
        """
        import torch

        name, more = ("logits", ()) if drop is None else ("logits_with_dropout", (drop,))
        found: Tensor | None = self.word(name, None, torch.Tensor, recipe, weights, ids, *more)
        if found is None:
            raise NotApplicable(f"the policy does not declare {name}()")
        return found

    def word(self, name: str, default: T, kind: type, *arguments: object) -> T:
        """Return what an optional method of the policy answers, or the default if the policy has no such method."""
        method = getattr(self.policy, name, None)
        if method is None:
            return default
        found = asked(lambda: method(*arguments))
        if found is not None and not isinstance(found, kind):
            raise AdapterFailed(f"policy.{name}() returned {found!r}: it must return {kind.__name__} or None")
        return cast(T, found)


def finite(number: float, method: str, update: int) -> float:
    """Return a number of the policy's. Raises AdapterFailed if it is not finite."""
    if not math.isfinite(number):
        raise AdapterFailed(
            f"policy.{method}() returned {number} for update {update + 1}: it must return a finite number"
        )
    return number


def asked(question: Callable[[], T]) -> T:
    """Return a policy's answer; what it raises on its own must not pass for an outcome of the suite.

    Raises:
        AdapterFailed: if the policy raised a Violation, NotApplicable or another exception of the suite.
    """
    try:
        return question()
    except ConformanceError as error:
        raise AdapterFailed(f"the policy raised {describe_error(error)}") from error


def newer(since: str, as_of: str | None) -> str:
    """Return the reason why something is not asked of an adapter that was written for an earlier version."""
    return f"newer than as_of: new in {since}, and the adapter was written for {as_of}"
