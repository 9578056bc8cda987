"""What the optimizers hold: every trained tensor once, and how it decays and learns."""

from collections import Counter

from conformance.auditing.held import first_steps, float32_copies, groups_of, steps
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.auditing.rules.weights import sizes
from conformance.errors import NotApplicable, Violation, quoted


@rule(
    "in-no-group",
    "groups",
    why="A tensor that no optimizer holds keeps its random start for ever.",
    mend="Build the groups from `model.named_parameters()` of the model that is trained, after the last tensor was "
    "added or replaced, and check that their sizes add up.",
    source="litgpt: a StableEmbedding put in after the optimizer was built",
)
def held(seen: Seen) -> None:
    """Every trainable tensor is in a group of an optimizer."""
    facts = seen.facts
    trained = [name for name, info in facts.trace.tensors.items() if info.trainable]
    owned = groups_of(facts)
    if not trained:
        raise NotApplicable("the audit did not see the model")
    copies = float32_copies(facts)
    lost = [name for name in trained if name not in owned and name not in copies]
    if lost:
        size = sizes(facts)
        share = sum(size[name] for name in lost) / max(sum(size[name] for name in trained), 1)
        words = f"no optimizer holds {quoted(lost)}, {share:.1%} of the trainable weights"
        idle = [name for name in lost if name in facts.noticed.promised]
        if idle:
            raise Violation(
                "every optimizer that was made steps", f"one was made for {quoted(idle)}, and never stepped"
            )
        if share > 0.5:
            raise Doubt("all trainable tensors are in a group, or frozen by requires_grad=False", words)
        raise Violation("all trainable tensors are in a group", words)


@rule(
    "in-two-groups",
    "groups",
    why="A tensor in two groups is stepped twice, with two rates and two decays.",
    mend="Sort each tensor into exactly one group; tied tensors have two names and are one tensor.",
    source="nanoGPT: decay groups by module type",
)
def held_once(seen: Seen) -> None:
    """No tensor is in two groups."""
    steps(seen.facts)
    twice: dict[str, None] = {}  # in order
    for update in seen.facts.updates:  # a run may make another optimizer on its way, as it unfreezes layers
        held = {step.number: step for step in update.steps}  # ZeRO steps one optimizer several times
        found = Counter(name for step in held.values() for name in step.tensors)
        twice |= dict.fromkeys(name for name, count in found.items() if count > 1)
    if twice:
        raise Violation("each tensor in one group", f"in two or more: {quoted(twice)}")


@rule(
    "outside-the-model",
    "groups",
    why="An optimizer that holds tensors of another model, or of a copy made before it was moved, trains nothing.",
    mend="Build the optimizer over the parameters of the model that is called, after `to`, `compile`, wrapping and "
    "swapping of modules.",
    source="pytorch: optimizer before model.to(device)",
)
def held_of_the_model(seen: Seen) -> None:
    """Every tensor that an optimizer holds belongs to the model, or has a gradient."""
    facts = seen.facts
    stale = {
        name
        for step in first_steps(facts)
        for name in step.tensors
        if name.startswith("foreign-") and all(update.gradients.get(name) is None for update in facts.updates)
    }
    if stale:
        raise Violation(
            "the optimizer holds the tensors of the model that is trained",
            f"{len(stale)} tensors that are not in the model and never have a gradient",
        )


@rule(
    "frozen-in-optimizer",
    "groups",
    why="A frozen tensor in a group costs memory for its state if it ever had a gradient, and decays if the optimizer "
    "applies decay without a gradient.",
    mend="Give the optimizer only tensors with requires_grad.",
    source="peft: optimizer over model.parameters()",
    advice=True,
)
def frozen_left_out(seen: Seen) -> None:
    """No frozen tensor is in a group."""
    owned = groups_of(seen.facts)
    pushed = {name for backward in seen.facts.backwards for name in backward.norms}  # a tensor may thaw on the way
    infos = seen.facts.trace.tensors.items()
    frozen = [name for name, info in infos if not info.trainable and name in owned and name not in pushed]
    if frozen:
        raise Violation("groups of trainable tensors only", f"frozen, and in a group: {quoted(frozen)}")


@rule(
    "decay-of-vectors",
    "groups",
    why="Weight decay pulls norm gains to 0, where they switch a layer off, and shrinks the rows of rare tokens.",
    mend="Put gains, biases and embeddings into a group with weight_decay=0.",
    source="minGPT, nanoGPT: configure_optimizers",
    advice=True,
)
def decay_of_vectors(seen: Seen) -> None:
    """Only matrices decay: gains and biases do not."""
    owned = groups_of(seen.facts)
    infos = seen.facts.trace.tensors
    bad = [
        name
        for name, groups in owned.items()
        if name in infos and len(infos[name].shape) < 2 and any(g.settings.get("weight_decay") for g in groups)
    ]
    if any(name in seen.facts.sharded for name in bad):
        raise NotApplicable("the model is sharded, and the shapes of its tensors are not known")
    if bad:
        raise Violation("gains and biases do not decay", f"they decay: {quoted(bad)}")


@rule(
    "first-rate-0",
    "groups",
    why="A first rate of 0 spends an update, and its batch, on nothing. Usually it is a schedule counted from 0.",
    mend="Start the warm-up at 1/n of the peak rate.",
    source="transformers: get_cosine_schedule_with_warmup",
    advice=True,
)
def first_rate(seen: Seen) -> None:
    """The first update has a learning rate above 0."""
    first = steps(seen.facts)[0]
    rates = [float(group.settings["lr"]) for group in first.groups if "lr" in group.settings]
    if not rates:
        raise NotApplicable("the groups hold no learning rate")
    if not any(rates):
        raise Violation("a first rate above 0", "all rates of the first update are 0")


@rule(
    "not-fused",
    "groups",
    why="Without it, every step reads and writes the weights several times: it takes two to ten times as long.",
    mend="Pass fused=True to torch's Adam, AdamW, SGD or Adagrad on a GPU.",
    source="PyTorch: torch.optim, fused implementations",
    advice=True,
)
def fused(seen: Seen) -> None:
    """On a GPU, an optimizer that has a fused kernel uses it."""
    if seen.facts.device != "cuda":
        raise NotApplicable("the model is not on a GPU")
    slow = {
        step.optimizer[0].rpartition(".")[2]
        for step in first_steps(seen.facts)
        if step.optimizer
        and step.optimizer[0].startswith("torch.optim.")
        and any("fused" in group.settings and not group.settings["fused"] for group in step.groups)
    }
    if slow:
        raise Violation("the fused kernel", f"fused is off: {quoted(sorted(slow))}")
