"""Steps: when optimizers and schedules act, and by which settings."""

from collections.abc import Mapping

from conformance.auditing.facts import Facts
from conformance.auditing.held import first_steps, steps
from conformance.auditing.passes import SPREAD
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.checks.reports import is_rounded, learning_rates
from conformance.errors import NotApplicable, Violation, quoted
from conformance.recording.trace import Update


@rule(
    "steps-again",
    "steps",
    why="The second step takes the same gradient again: the rate is doubled, and the moments count it twice.",
    mend="Call step once for each update; look whether a hook, a library or a second loop calls it, too.",
    source="PyTorch tutorial: optimizer step in backward; field reports of doubled hooks",
)
def one_step_each(seen: Seen) -> None:
    """No optimizer steps twice with the same gradients."""
    steps(seen.facts)
    earlier: list[Update | None] = [None, *seen.facts.updates]
    for number, update in enumerate(seen.facts.updates, start=1):
        if update.unfounded and not other_gradients(earlier[number - 1], update):
            name = update.optimizer[0].rpartition(".")[2] if update.optimizer else "an optimizer"
            raise Violation("one step for each gradient", f"{name} stepped again with no backward in between: {number}")
        held = [name for step in update.steps if step.in_backward for name in step.tensors]
        twice = sorted({name for name in held if held.count(name) > 1})
        if twice:
            raise Violation("one step for each gradient", f"stepped twice in one backward: {quoted(twice)}")


def other_gradients(earlier: Update | None, later: Update) -> bool:
    """Return True if a step finds another gradient than the one before it, and not only scaled.

    Gradients may come without a backward that the audit sees, as those of torch.func do.
    """
    before, after = None if earlier is None else earlier.measured_gradients, later.measured_gradients
    if before is None or after is None:
        return False
    pairs = [(before.norms[name].item(), norm.item()) for name, norm in after.norms.items() if name in before.norms]
    factors = [now / then for then, now in pairs if then > 0]
    return bool(factors) and max(factors) > (1 + SPREAD) * min(factors)


@rule(
    "steps-stop",
    "steps",
    why="A run whose optimizer steps no more goes on printing losses.",
    mend="Look at the condition around optimizer.step(), and at what a compiled optimizer was compiled for.",
    source="pytorch#115607: a compiled optimizer stops stepping",
)
def goes_on_stepping(seen: Seen) -> None:
    """The optimizer steps as regularly in later updates as in the first ones."""
    facts = seen.facts
    steps(facts)
    done = len(facts.updates)
    if any(step.in_backward for update in facts.updates for step in update.steps):
        raise NotApplicable("the optimizer steps inside the backward")
    most = max(sum(b.update == number for b in facts.backwards) for number in range(done))
    after = sum(backward.update >= done for backward in facts.backwards)
    if after > 2 * most:
        raise Violation(
            f"a step after every {most} backward passes", f"after update {done}, {after} backward passes and no step"
        )


@rule(
    "steps-of-schedule",
    "steps",
    why="A schedule that steps at every microbatch ends k times too early; with a warm-up it begins k times too steep.",
    mend="Call scheduler.step() once per update, after optimizer.step().",
    source="starVLA#210, pytorch-lightning#1476, accelerate#963",
)
def schedule_by_update(seen: Seen) -> None:
    """A learning-rate schedule steps once per update."""
    facts = seen.facts
    found = facts.noticed.scheduled
    if not found or len(facts.updates) < 2:
        raise NotApplicable("no step of a schedule of torch.optim was seen, or fewer than two updates")
    most, updates = max(found.values()), len(facts.updates)
    passes = sum(backward.update < updates for backward in facts.backwards) / updates
    each = most / updates
    # A schedule may count microbatches, and accelerate's counts the processes: that is meant, or may be.
    meant = {1.0, passes, float(facts.world), passes * facts.world}
    if each > 1.4 and min(abs(each - number) for number in meant) > 1 / updates:
        raise Violation(
            "one step of the schedule for each update, or for each microbatch", f"{each:.3g} for each update"
        )
    if each > 1.4 and passes > 1 and abs(each - facts.world) > 1 / updates:
        raise Doubt(f"{updates} steps of the schedule in {updates} updates", f"{most} steps, {each:.2g} for each")


@rule(
    "told-rate",
    "steps",
    why="A rate that is computed and printed, and does not reach the groups, trains by another one than you read.",
    mend="Set group['lr'] of every group of the optimizer that steps, or let a scheduler of torch.optim do it.",
    source="2U1/Qwen-VL-Series-Finetune#81",
)
def rate_arrives(seen: Seen) -> None:
    """The learning rate that the run prints is the rate of one of the optimizer's groups."""
    facts = seen.facts
    numbers = [number for said in facts.said if said.update >= 1 for number in learning_rates([said.text])]
    if len(numbers) < 2:
        raise NotApplicable("fewer than two lines with a learning rate were printed or logged")
    held = [{float(g.settings["lr"]) for g in u.groups if "lr" in g.settings} for u in facts.updates]
    rates = set[float]().union(*held)
    # A run may print the rate of the next update; the last of those is that of an update that was not recorded.
    wrong = [number for number in numbers[:-1] if not any(is_rounded(number, rate) for rate in rates)]
    if not rates or not wrong:
        return
    expected = f"printed rates that are the groups': {', '.join(f'{rate:.4g}' for rate in sorted(rates))}"
    told = f"printed: {', '.join(numbers)}"
    raise (Violation if len(rates) == 1 and len(set(numbers)) > 1 else Doubt)(expected, told)


@rule(
    "odd-settings",
    "steps",
    why="A first beta above the second averages the direction longer than the size: the moments of AdamW disagree. "
    "Adam's own weight_decay is added to the gradient and divided by its size: tensors with large gradients hardly "
    "decay.",
    mend="Pass betas=(beta1, beta2) with the smaller first; use AdamW for decoupled decay.",
    source="EleutherAI/gpt-neox#228; Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization",
    advice=True,
)
def usual_settings(seen: Seen) -> None:
    """The optimizer's betas are in order, and its weight decay is decoupled."""
    for step in first_steps(seen.facts):
        for group in step.groups:
            settings = group.settings
            betas = settings.get("betas")
            pair = list(betas) if isinstance(betas, tuple | list) else []
            if len(pair) == 2 and all(isinstance(beta, float) for beta in pair) and pair[0] > pair[1]:
                raise Violation("a first beta below the second", f"betas = ({pair[0]:g}, {pair[1]:g})")
            coupled = step.optimizer[:1] == ("torch.optim.adam.Adam",) and not settings.get("decoupled_weight_decay")
            if coupled and settings.get("weight_decay"):
                words = f"Adam with a coupled weight_decay of {settings['weight_decay']:g}"
                raise Violation("decoupled weight decay", words)


@rule(
    "muon-tensors",
    "steps",
    why="Muon makes a movement whose directions are all equally long: right for a matrix inside the model, wrong for "
    "a table of rows that are looked up one by one.",
    mend="Give embedding, head, gains and biases to AdamW, and the matrices inside the blocks to Muon.",
    source="DeepSpeed#8438; Jordan et al. 2024, Muon",
    advice=True,
)
def muon_gets_inner_matrices(seen: Seen) -> None:
    """Muon gets the matrices inside the model, not the embedding or the head."""
    facts = seen.facts
    held = [step for step in first_steps(facts) if step.optimizer and "muon" in step.optimizer[0].lower()]
    if not held:
        raise NotApplicable("no optimizer of the run is called Muon")
    tables = {name for name, info in facts.trace.tensors.items() if is_table(facts, name, info.owner, info.shape)}
    by_muon = {name for step in held for group in step.groups for name in group.tensors if is_muon(group.settings)}
    bad = sorted(tables & by_muon)
    if bad:
        raise Violation("embedding and head with another optimizer", f"Muon holds {quoted(bad)}")


def is_muon(settings: Mapping[str, object]) -> bool:
    """Return True if an optimizer that combines Muon and AdamW steps a group of such settings by Muon."""
    if "use_muon" in settings:
        return bool(settings["use_muon"])
    if "adam" in f"{settings.get('algorithm')} {settings.get('kind')}".lower():
        return False
    return "betas" not in settings or bool(settings.get("momentum"))


def is_table(facts: Facts, name: str, owner: str, shape: tuple[int, ...]) -> bool:
    """Return True for an embedding, and for a head: a matrix with a row for each token."""
    rows = {info.shape[0] for info in facts.trace.embeddings}
    return "Embedding" in owner or (len(shape) == 2 and owner == "Linear" and shape[0] in rows and "head" in name)


@rule(
    "autocast-too-wide",
    "steps",
    why="Inside autocast the backward and the step compute what they were not meant to in 16 bits, and cached casts "
    "outlive the forward.",
    mend="Close the autocast block after the loss is computed.",
    source="pytorch#120376; PyTorch: AMP examples",
    advice=True,
)
def autocast_ends(seen: Seen) -> None:
    """Autocast is off when backward and step begin."""
    facts = seen.facts
    if not facts.trace.losses:
        raise NotApplicable("no backward was seen")
    inside = sum(loss.autocast for loss in facts.trace.losses)
    if inside:
        raise Violation("backward outside autocast", f"{inside} of {len(facts.trace.losses)} begin inside it")
    if any(update.autocast for update in facts.updates):
        raise Violation("steps outside autocast", "an optimizer steps inside it")


@rule(
    "recomputed-dropout",
    "steps",
    why="A block that is recomputed with other dropout masks than it was computed with has a wrong gradient. The loss "
    "is right.",
    mend="Leave preserve_rng_state of torch.utils.checkpoint at True where a block drops something.",
    source="OLMo-core#828, guided-diffusion#167",
)
def recomputed_alike(seen: Seen) -> None:
    """If the model uses dropout, activation checkpointing restores the random state before it computes again."""
    noticed = seen.facts.noticed
    if not noticed.recomputed:
        raise NotApplicable("no call of torch.utils.checkpoint was seen")
    if not all(noticed.recomputed) and any(seen.facts.dropout.values()):
        raise Violation("preserve_rng_state=True beside dropout", "blocks are recomputed with other dropout masks")


@rule(
    "same-draws",
    "steps",
    why="A generator that is seeded in the loop gives every update the same dropout masks, and often the same batch.",
    mend="Seed once, before the model is built.",
    source="field reports: manual_seed inside the loop",
)
def draws_anew(seen: Seen) -> None:
    """While the model uses dropout, PyTorch's random generator moves on from update to update."""
    facts = seen.facts
    states = facts.noticed.states
    if not any(facts.dropout.values()) or facts.device != "cpu":
        raise NotApplicable("the model drops nothing, or not by the generator of the CPU")
    if len(states) < 3:
        raise NotApplicable("fewer than three updates were seen")
    if len(set(states)) == 1:
        raise Violation("another state of the generator in each update", f"one state in all {len(states)} updates")
