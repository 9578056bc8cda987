"""The weights: where they begin, and whether all of them are trained."""

import math

import torch

from conformance.auditing.entropies import UNSEEN
from conformance.auditing.facts import Facts
from conformance.auditing.held import COARSE, float32_copies
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.checks.initialization import LOSS_ABOVE, LOSS_MARGIN
from conformance.errors import NotApplicable, Violation, quoted
from conformance.recording.trace import Update

ABSURD = 1e6
"""No initialisation draws weights whose mean square root is this large; memory read as floats often is."""


def sizes(facts: Facts) -> dict[str, int]:
    """Return the number of elements of each tensor that this process holds."""
    return {name: math.prod(info.shape) for name, info in facts.trace.tensors.items()}


def deviations(facts: Facts) -> dict[str, float]:
    """Return the root mean square of each floating-point tensor at the start."""
    measured = facts.trace.measured_initial
    if measured is None or not measured.norms:
        raise NotApplicable("the audit did not see the model before its first update")
    found = sizes(facts)
    return {name: norm.item() / max(found[name], 1) ** 0.5 for name, norm in measured.norms.items() if name in found}


@rule(
    "uninitialised",
    "weights",
    why="Weights that nobody wrote hold whatever was in memory: zeros on one machine, NaN or garbage on the next.",
    mend="Initialise every parameter after it was allocated, also after `to_empty` and on a resume that loads only "
    "some tensors. Compare the names below with those that your initialisation visits.",
    source="pytorch-lightning#16729, torchtitan#1055",
)
def uninitialised(seen: Seen) -> None:
    """Every weight is initialised before the first forward reads it."""
    found = deviations(seen.facts)
    bad = [name for name, value in found.items() if not value < ABSURD]
    if bad:
        raise Violation("finite weights of ordinary size at the start", f"memory that nobody wrote in {quoted(bad)}")


@rule(
    "default-init",
    "weights",
    why="PyTorch's defaults (N(0, 1) for embeddings, uniform for linear layers) make the first logits of a GPT much "
    "too large, or its layers too small. They are a sign that the model's own initialisation was skipped.",
    mend="Call your initialisation after the model is built (`model.apply(init)`), and on every path that starts "
    "training: one device, several devices, resume=False.",
    source="litgpt#1938",
    advice=True,
)
def default_init(seen: Seen) -> None:
    """The weights are drawn for this model, and are not PyTorch's defaults."""
    trace = seen.facts.trace
    found = deviations(seen.facts)
    if found and first_loss(seen.facts) < math.log(vocabulary(seen.facts)) - LOSS_MARGIN:
        raise NotApplicable("the model was trained before")
    bad = []
    for name, value in found.items():
        info = trace.tensors[name]
        if name in seen.facts.sharded or len(info.shape) != 2 or not info.trainable:
            continue
        if "Embedding" in info.owner:
            default = abs(value - 1) < 0.02
        elif info.owner == "Linear":
            limit = 1 / info.shape[1] ** 0.5
            fits = abs(value - limit / 3**0.5) < 0.03 * limit / 3**0.5
            default = fits and bool((trace.initial[name].abs() <= limit * 1.0001).all())
        else:
            continue
        bad += [name] if default else []
    if bad:
        raise Violation("weights drawn by the model's own initialisation", f"PyTorch's defaults in {quoted(bad)}")


def first_loss(facts: Facts) -> float:
    """Return the mean of the first cross entropy that was computed with gradients."""
    for entropy in facts.trace.entropies:
        if entropy.grad_enabled and entropy.counted:
            return entropy.total / entropy.counted
    raise NotApplicable(UNSEEN)


def vocabulary(facts: Facts) -> int:
    """Return the number of tokens, by the largest embedding."""
    sizes = [info.shape[0] for info in facts.trace.embeddings]
    if not sizes:
        raise NotApplicable("the model has no nn.Embedding, so the size of its vocabulary is not known")
    return max(sizes)


@rule(
    "first-loss",
    "weights",
    why="A model that knows nothing gives every token the same chance: its loss is ln V. A first loss far above that "
    "means logits that are sure of nothing but wrong: weights too large, or wrong targets.",
    mend="Draw weights with a standard deviation near 0.02, and scale down what is added to the residual stream.",
    source="Karpathy, A Recipe for Training Neural Networks",
    advice=True,
)
def starts_ignorant(seen: Seen) -> None:
    """The first loss of a fresh model is the loss of a uniform guess, ln V."""
    loss, size = first_loss(seen.facts), vocabulary(seen.facts)
    if loss < math.log(size) - LOSS_MARGIN:
        raise NotApplicable(f"the first loss is {loss:.2f}, below ln {size}: the model was trained before")
    if not loss <= math.log(size) + LOSS_ABOVE:
        raise Violation(f"a first loss near ln {size} = {math.log(size):.2f}", f"{loss:.2f}")


@rule(
    "not-finite",
    "weights",
    why="A NaN in one weight reaches every logit at the next forward; the run is over and does not know it.",
    mend="Guard the step: skip the update, or end the run, when the loss or the gradient norm is not finite.",
    source="nanotron#117",
)
def finite(seen: Seen) -> None:
    """All weights stay finite."""
    initial = seen.facts.trace.measured_initial
    for number, update in enumerate(updates(seen.facts), start=1):
        assert update.measured_after is not None
        bad = [
            name
            for name, norm in update.measured_after.norms.items()
            if not norm.isfinite() and (initial is None or name not in initial.norms or initial.norms[name].isfinite())
        ]
        if bad:
            raise Violation(f"finite weights after update {number}", f"NaN or infinity in {quoted(bad)}")


def updates(facts: Facts) -> list[Update]:
    """Return the updates with figures of the whole tensors."""
    found = [update for update in facts.updates if update.measured_after is not None]
    if not found:
        raise NotApplicable("no update was seen")
    return found


@rule(
    "never-moves",
    "weights",
    why="A trained tensor that stays where it began is not trained: the model is smaller than you think.",
    mend="Look for `detach`, `no_grad`, a wrong parameter list, a copy of the tensor that the optimizer holds, or a "
    "step that skips it.",
    source="pytorch#191763: fused SGD moves no 16-bit weight on the CPU",
)
def moves(seen: Seen) -> None:
    """Every tensor that has a gradient and a learning rate above 0 moves."""
    facts = seen.facts
    found = updates(facts)
    still: list[str] = []
    rounded: list[str] = []
    copies = float32_copies(facts)
    for name, info in facts.trace.tensors.items():
        pushed = any(pushes(update, name) for update in found)
        if not info.trainable or not pushed:
            continue
        first, last = found[0].measured_before, found[-1].measured_after
        assert first is not None
        assert last is not None
        if name in first.bits and name in last.bits and not moved(found, name):
            (rounded if info.dtype in COARSE else still).append(name)
    stale = [name for name, copy in copies.items() if not moved(found, name) and moved(found, copy)]
    if copies and len(stale) == len(copies) and len(found) > 1:  # single ones may be hidden by rounding
        raise Violation(
            "the model's 16-bit tensors follow the float32 copies that the optimizer moves",
            f"the copies move, and not one bit changed in {quoted(stale)}",
        )
    if still:
        raise Violation(f"all tensors move within {len(found)} updates", f"not one bit changed in {quoted(still)}")
    if rounded:
        raise Doubt(
            f"all tensors move within {len(found)} updates",
            f"not one bit changed in {quoted(rounded)}, in 16 bits: the step is smaller than the dtype can add, or "
            "the optimizer skips them",
        )


def moved(found: list[Update], name: str) -> bool:
    """Return True if a tensor has other bits after the last of these updates than before the first, or is not known."""
    first, last = found[0].measured_before, found[-1].measured_after
    if first is None or last is None or name not in first.bits or name not in last.bits:
        return True
    # A digest alone can meet itself: steps of one size up and down, as a sign optimizer makes, cancel in it.
    begun, ended = found[0].before, found[-1].after
    sampled = name in begun and name in ended and not torch.equal(begun[name].nan_to_num(), ended[name].nan_to_num())
    same_norm = torch.equal(first.norms[name], last.norms[name]) if name in first.norms and name in last.norms else True
    return sampled or not same_norm or not torch.equal(first.bits[name], last.bits[name])


def pushes(update: Update, name: str) -> bool:
    """Return True if a tensor has a gradient that is not zero, and its optimizer a rate."""
    measured = update.measured_gradients
    if measured is None or name not in measured.norms or update.skipped:
        return False
    rates = [float(g.settings.get("lr", 0.0)) for g in update.groups if name in g.tensors]
    return bool(measured.norms[name] > 0) and any(rate > 0 for rate in rates)


@rule(
    "ties-apart",
    "weights",
    why="A tied embedding that comes apart is two tensors from then on: the head trains, and the embedding does not.",
    mend="Tie after moving, wrapping and loading (`head.weight = wte.weight`), and check it with `is`.",
    source="transformers#35080",
)
def stays_tied(seen: Seen) -> None:
    """Tensors that are tied at the start are tied at the end."""
    facts = seen.facts
    if not facts.tied_at_end:
        raise NotApplicable("the audit did not see the model at the end")
    tied = [info.names for info in facts.trace.tensors.values() if len(info.names) > 1]
    if not tied:
        alike = equal_matrices(facts)
        if alike:
            raise Doubt("a tied matrix is one tensor", f"two, which began equal: {quoted(alike)}")
        raise NotApplicable("no two names share a tensor")
    together = [set(names) for names in facts.tied_at_end.values()]
    for names in tied:
        if not any(set(names) <= others for others in together):
            raise Violation(f"{quoted(names)} stay one tensor", "they are several tensors at the end of the recording")


def equal_matrices(facts: Facts) -> list[str]:
    """Return two trained matrices of the same shape that had the same content at the start; empty if there are none."""
    measured, found = facts.trace.measured_initial, dict[tuple[object, ...], str]()
    for name, info in facts.trace.tensors.items():
        if measured is None or name not in measured.bits or len(info.shape) != 2 or not measured.norms[name].item():
            continue
        key = (info.shape, measured.bits[name].item(), measured.norms[name].item())
        spread = name in facts.trace.initial and len(facts.trace.initial[name].unique()) > 2
        if info.trainable and spread and name not in facts.sharded:
            if key in found:
                return [found[key], name]
            found[key] = name
    return []


@rule(
    "sixteen-bit-weights",
    "weights",
    why="bfloat16 has 8 bits: near 1 it cannot add less than 0.004. Small steps are lost, and training stalls late, "
    "when nobody looks.",
    mend="Keep the weights in float32 and compute in bfloat16 (autocast), keep a float32 copy in the optimizer, or use "
    "an optimizer that rounds stochastically.",
    source="litgpt#1072",
    advice=True,
)
def float32_copy(seen: Seen) -> None:
    """Trained weights, or the optimizer's copy of them, are in float32."""
    facts = seen.facts
    trained = [name for name, info in facts.trace.tensors.items() if info.trainable]
    if not trained:
        raise NotApplicable("the audit did not see the model")
    coarse = [name for name in trained if facts.trace.tensors[name].dtype in COARSE]
    masters = [key for u in facts.updates[:1] for entry in u.state_after.values() for key in entry if "master" in key]
    coarse = [name for name in coarse if name not in float32_copies(facts)]
    if coarse and not masters:
        raise Violation("float32 weights, or a float32 copy of them", f"16-bit weights alone in {quoted(coarse)}")
