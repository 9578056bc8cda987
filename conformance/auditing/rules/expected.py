"""What the user said is meant, by ``--expect``: judged with certainty."""

import math
import re

from conformance.auditing.held import groups_of, steps
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.auditing.rules.gradients import total_norm
from conformance.auditing.rules.weights import default_init, first_loss, vocabulary
from conformance.checks.initialization import LOSS_ABOVE, LOSS_MARGIN
from conformance.errors import NotApplicable, UsageError, Violation, quoted

WORDS = {
    "lr": "peak learning rate",
    "clip": "limit of the gradient norm",
    "tied": "the head shares its tensor with the embedding",
    "fresh": "training begins with fresh weights",
    "seed": "seed of PyTorch's generator",
    "no-weight-decay": "regular expression of the names that do not decay",
}


def parse(text: str) -> dict[str, str]:
    """Return the expectations in ``lr=3e-4,clip=1.0,tied``. Raises UsageError for one that is not known."""
    found = {}
    # A comma inside a regular expression stays: a new expectation begins with one of the known words.
    pieces = re.split(rf",\s*(?=(?:{'|'.join(WORDS)})(?:=|,|$))", text.strip())
    whole = [[piece] if piece.startswith("no-weight-decay=") else piece.split(",") for piece in pieces]
    for piece in filter(None, (part.strip() for parts in whole for part in parts)):
        name, _, value = piece.partition("=")
        if name not in WORDS:
            raise UsageError(f"--expect knows no {name!r}: use {', '.join(WORDS)}.")
        if name in ("lr", "clip", "seed"):
            try:
                if not math.isfinite(float(value)):
                    raise ValueError
            except ValueError:
                raise UsageError(f"--expect {name} needs a number, as in {name}=1: {piece!r} has none.") from None
        if name == "no-weight-decay":
            try:
                re.compile(value)
            except re.error as error:
                raise UsageError(f"--expect no-weight-decay is not a regular expression: {error}.") from None
        found[name] = value
    return found


def wanted(seen: Seen, name: str) -> str:
    """Return what was said. Raises NotApplicable if nothing was."""
    if name not in seen.expected:
        raise NotApplicable(f"--expect {name} was not given")
    return seen.expected[name]


@rule("expect-lr", "expected", why="You said so.", mend="Follow the setting to the optimizer.")
def rate_is(seen: Seen) -> None:
    """The optimizer was made with the learning rate that you expect."""
    meant = float(wanted(seen, "lr"))
    found = {
        float(group.settings[key])
        for step in steps(seen.facts)
        for group in step.groups
        for key in ("initial_lr", "lr", "max_lr")
        if key in group.settings
    } | set(seen.facts.made_with)
    if not any(abs(rate - meant) <= 1e-6 * abs(meant) for rate in found):
        raise Violation(f"a learning rate of {meant:g}", quoted([f"{rate:g}" for rate in sorted(found)]))


@rule(
    "expect-clip", "expected", why="You said so.", mend="Call clip_grad_norm_ once before each step, with all tensors."
)
def clip_is(seen: Seen) -> None:
    """Every update's gradient is clipped to the limit that you expect."""
    limit, facts = float(wanted(seen, "clip")), seen.facts
    steps(facts)
    for number, update in enumerate(facts.updates, start=1):
        own = [clip.limit for clip in facts.clips if clip.update == number - 1]
        if own and any(abs(found - limit) > 1e-6 * limit for found in own):
            raise Violation(f"clipping to {limit:g} in update {number}", f"the limit is {quoted(own)}")
        norm = total_norm(update.measured_gradients.norms) if update.measured_gradients else 0.0
        if norm > limit * 1.02:
            raise Violation(f"a gradient of norm {limit:g} at most in update {number}", f"{norm:.4g}")
    if not facts.clips:
        raise NotApplicable("no call of clip_grad_norm_ was seen, and no gradient was longer than the limit")


@rule("expect-tied", "expected", why="You said so.", mend="Assign head.weight = wte.weight after building and loading.")
def tied(seen: Seen) -> None:
    """The head shares its tensor with the embedding, as you expect."""
    wanted(seen, "tied")
    infos = seen.facts.trace.tensors
    if not infos:
        raise NotApplicable("the audit did not see the model")
    if not any(len(info.names) > 1 and "Embedding" in info.owner for info in infos.values()):
        raise Violation("an embedding whose tensor has a second name", "no embedding's tensor has one")


@rule("expect-fresh", "expected", why="You said so.", mend="Initialise the model where no checkpoint is loaded.")
def fresh(seen: Seen) -> None:
    """Training begins with fresh weights that the model's own initialisation drew."""
    wanted(seen, "fresh")
    loss, size = first_loss(seen.facts), vocabulary(seen.facts)
    if not -LOSS_MARGIN <= loss - math.log(size) <= LOSS_ABOVE:
        raise Violation(f"a first loss near ln {size} = {math.log(size):.2f}", f"{loss:.2f}")
    default_init(seen)


@rule("expect-seed", "expected", why="You said so.", mend="Call torch.manual_seed before the model is built.")
def seed_is(seen: Seen) -> None:
    """PyTorch's generator has the seed that you expect."""
    meant = int(float(wanted(seen, "seed")))
    if seen.facts.seed is None:
        raise NotApplicable("no backward was seen")
    if seen.facts.seed != meant:
        raise Violation(f"seed {meant}", f"seed {seen.facts.seed}")


@rule("expect-no-decay", "expected", why="You said so.", mend="Sort these tensors into a group with weight_decay=0.")
def spared(seen: Seen) -> None:
    """The tensors that you name do not decay."""
    pattern = re.compile(wanted(seen, "no-weight-decay"))
    owned = groups_of(seen.facts)
    infos = seen.facts.trace.tensors
    named = [
        name for name in owned if any(pattern.search(n) for n in (infos[name].names if name in infos else (name,)))
    ]
    if not named:
        raise Doubt("tensors whose name fits", f"no tensor in a group fits {pattern.pattern!r}")
    bad = [name for name in named if any(group.settings.get("weight_decay") for group in owned[name])]
    if bad:
        raise Violation(f"no decay of {quoted(named)}", f"these decay: {quoted(bad)}")
