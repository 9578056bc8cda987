"""A subject: the training stack under test, seen through an adapter of some forty lines."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from conformance.capabilities import everything_but as everything_but  # adapters of 0.1 may import it from here

if TYPE_CHECKING:
    from torch import Tensor, nn

    from conformance.recipe import Recipe
    from conformance.recording.trace import Checkpoint, TensorInfo


@dataclass(frozen=True)
class Normal:
    """Drawn from a normal distribution."""

    mean: float
    std: float


@dataclass(frozen=True)
class TruncatedNormal:
    """Drawn from a normal distribution, and again if outside [low, high].

    ``mean`` and ``std`` are those of the normal before it is truncated, as ``torch.nn.init.trunc_normal_`` takes them.
    """

    mean: float
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class Uniform:
    """Drawn from a uniform distribution on [low, high)."""

    low: float
    high: float


@dataclass(frozen=True)
class Constant:
    """Every element has this value."""

    value: float


Distribution = Normal | TruncatedNormal | Uniform | Constant
Place = Literal["epoch", "window", "ranks", "microbatch", "validation", "tail"]
"""Where something may be left over: samples at the end of an epoch that fill no batch; microbatches there that fill no
update; samples there that do not divide by the ranks; the sequences of a smaller microbatch of an update, or of a
smaller last validation batch; and the tail of a validation document, which fills no window."""
Leftovers = Literal["carried", "short", "dropped", "repeated", "weighed"]
"""What happens to leftovers. carried: the batch (or update) is filled up from the next epoch. short: it is smaller.
dropped: they are not seen in this epoch. repeated: it is filled up with samples that this epoch has seen. weighed (of
smaller microbatches and validation batches): each of their tokens weighs as much as any other."""
Setting = Literal["lr", "weight_decay"]
Winner = Literal["recipe", "checkpoint"]
"""Which value is used after a resume with other settings: that of the new run, or that in the checkpoint."""


class Policy(Protocol):
    """What the stack itself declares, from its documentation or design. The suite judges against nothing else."""

    def initial(self, recipe: "Recipe", tensor: "TensorInfo") -> Distribution:
        """Return the distribution that a parameter of the stack's own model starts from."""

    def decays(self, recipe: "Recipe", tensor: "TensorInfo") -> bool:
        """Return True if weight decay acts on a parameter."""

    def learning_rate(self, recipe: "Recipe", update: int) -> float:
        """Return the learning rate of update ``update``, counted from 0."""


class DetailedPolicy(Policy, Protocol):
    """Further methods of a policy. Each is optional; without it the suite assumes what most stacks do."""

    def rate(self, recipe: "Recipe", update: int, tensor: "TensorInfo") -> float:
        """Return the learning rate of one tensor; without this method, all tensors have that of ``learning_rate``."""

    def owner(self, recipe: "Recipe", tensor: "TensorInfo") -> str | None:
        """Return the class path of the optimizer that owns a tensor; without this method, or if None, any may."""

    def auxiliary_loss(self, recipe: "Recipe") -> bool:
        """Return True if the loss has terms besides the cross entropy, such as a z-loss; without this method, False."""

    def context(self, recipe: "Recipe") -> int | None:
        """Return how many tokens a logit sees through all layers, its own included; without this method, all."""

    def document_end(self, recipe: "Recipe") -> int | None:
        """Return the id that ends a document, if tokens do not see earlier documents; without this method, they do."""

    def leftovers(self, recipe: "Recipe", place: Place) -> Leftovers | None:
        """Return what happens to leftovers; without this method, or if None, the suite does not look."""

    def wins_on_resume(self, recipe: "Recipe", setting: Setting) -> Winner | None:
        """Return whose setting is used after a resume; without this method, or if None, the suite does not look."""

    def logits(self, recipe: "Recipe", weights: "Mapping[str, Tensor]", ids: "Tensor") -> "Tensor | None":
        """Return the logits (B, T, V) of token ids (B, T) in float64, from weights in float64 by name.

        Write the model down a second time, from its paper, in plain operations, without dropout. Without this method,
        or if None, the suite does not look.
        """

    def logits_with_dropout(
        self,
        recipe: "Recipe",
        weights: "Mapping[str, Tensor]",
        ids: "Tensor",
        drop: "Callable[[Tensor], Tensor]",
    ) -> "Tensor | None":
        """Return the same in training, with ``drop`` called on each tensor of activations that dropout acts on.

        Do so at each place where the stack drops some, with the probability of the recipe. Without this method, or if
        None, the suite does not look.
        """


class Subject(Protocol):
    """The adapter. ``load(checkpoint)`` may be added (see :class:`Loads`); without it ``lacks`` must name ``load``.

    An adapter may also have ``as_of``, the version of the suite that it was written for, such as ``"0.1"``: clauses
    and capabilities that are newer then do not apply, so that an upgrade does not turn a green run red.
    """

    @property
    def name(self) -> str:
        """Name of the stack, as its users call it. (A plain attribute does, here and below.)"""

    @property
    def version(self) -> str:
        """Version of the stack, not of the adapter."""

    @property
    def lacks(self) -> Mapping[str, str]:
        """Capabilities that the stack does not have, each with a reason that can be checked in its source."""

    @property
    def policy(self) -> Policy:
        """What the stack declares."""

    def train(self, recipe: "Recipe") -> None:
        """Run the stack's own entry point on the recipe, to the end."""


@runtime_checkable
class Loads(Protocol):
    """A subject with the capability ``load``."""

    def load(self, checkpoint: "Checkpoint") -> "nn.Module":
        """Return the plain eager module in a checkpoint."""
