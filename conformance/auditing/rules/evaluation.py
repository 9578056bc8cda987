"""Evaluation beside training: the same task, with nothing drawn at random."""

import torch

from conformance.auditing.facts import Facts
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.auditing.rules.data import misplaced, pair_up, training
from conformance.errors import NotApplicable, Violation, quoted
from conformance.recording.trace import Forward


def evaluations(facts: Facts) -> list[Forward]:
    """Return the forwards without gradients. Raises NotApplicable if none was seen."""
    found = [forward for forward in facts.trace.forwards if not forward.grad_enabled]
    if not found:
        raise NotApplicable("the run evaluated nothing while it was recorded")
    return found


@rule(
    "evaluation-shift",
    "evaluation",
    why="Training and validation loss are compared all the time. If only one of them is of the next token, the gap "
    "between them says nothing.",
    mend="Compute the validation loss by the function that computes the training loss.",
    source="litgpt#419",
)
def evaluates_the_next_token(seen: Seen) -> None:
    """In evaluation, too, the target at each position is the next token."""
    facts = seen.facts
    entropies = [entropy for entropy in facts.trace.entropies if not entropy.grad_enabled]
    pairs = pair_up([forward.ids for forward in evaluations(facts)], entropies)
    judged = 0
    for ids, targets in pairs:
        found = misplaced(ids, targets)
        if found is None:
            continue
        judged += 1
        if found:
            raise Violation("targets of the evaluation that are the next token", found)
    if not judged:
        raise NotApplicable("the targets of the evaluation are not the ids of the same batch, in the same order")


@rule(
    "evaluation-drops",
    "evaluation",
    why="With dropout the model is evaluated weaker than it is, and by another number each time.",
    mend="Give functional dropout and attention their probability only in training: `self.dropout if self.training "
    "else 0.0`.",
    source="nanoGPT#240, pytorch#124464",
)
def nothing_is_dropped(seen: Seen) -> None:
    """A model in eval mode drops nothing."""
    noticed = seen.facts.noticed
    if not noticed.evaluations:
        raise NotApplicable("no forward without gradients of a model in eval mode was seen")
    if noticed.drops:
        raise Violation("no dropout in evaluation", f"still on: {quoted(noticed.drops)}")


@rule(
    "evaluation-averages",
    "evaluation",
    why="A schedule-free optimizer trains at one point and is good at another, its average. Evaluated and saved at the "
    "first, the model is worse than it should be.",
    mend="Call optimizer.eval() before an evaluation or a save, and optimizer.train() before training goes on.",
    source="facebookresearch/schedule_free#22, sd-scripts#1250",
)
def evaluates_averages(seen: Seen) -> None:
    """A schedule-free optimizer is in eval mode while the model is evaluated."""
    noticed = seen.facts.noticed
    if not noticed.averages:
        raise NotApplicable("no evaluation beside an optimizer with averages was seen")
    if noticed.averages_unused:
        raise Violation("optimizer.eval() before the evaluation", "the optimizer is in training mode")


@rule(
    "evaluated-and-trained",
    "evaluation",
    why="A loss on batches that are trained on says how well they are remembered.",
    mend="Keep a part of the data for evaluation, and fetch the next training batch after it.",
    source="SpeedrunningPLMs#5, transformers#8295",
)
def held_out(seen: Seen) -> None:
    """No sequence of an evaluation is trained on."""
    facts = seen.facts
    found = evaluations(facts)
    if not facts.compiled and all(entropy.grad_enabled for entropy in facts.trace.entropies):
        # Forwards of the batch that is then trained on: the policy before an update of PPO, or a frozen reference.
        raise NotApplicable("no cross entropy was computed without gradients, so nothing seen is an evaluation")
    held = [forward for forward in found if forward.ids.size(1) >= 8]
    trained = {tuple(row) for forward in training(facts) for row in forward.ids.tolist()}
    rows = [tuple(row) for forward in held for row in forward.ids.tolist()]
    if not rows:
        raise NotApplicable("the sequences are too short to be told apart")
    for update in sorted({forward.update for forward in held}):
        evaluated = [forward.ids for forward in held if forward.update == update]
        after = [forward.ids for forward in training(facts) if forward.update == update]
        others = [tuple(row) for ids in evaluated[:-1] for row in ids.tolist()]
        # The loss of one batch before it is trained on may be meant. The last of several, and only that one, is not.
        if others and after and torch.equal(evaluated[-1], after[0]) and not trained & set(others):
            words = f"the last of {len(evaluated)} batches evaluated before update {update + 1} is then trained on"
            raise Violation("a training batch after the evaluation", words)
    both = sum(row in trained for row in rows)
    whole = [f.update for f in held for t in training(facts) if f.update <= t.update and torch.equal(f.ids, t.ids)]
    if both:
        where = f"; the batch evaluated before update {whole[0] + 1} is trained on" if whole else ""
        raise Doubt("other sequences than those of training", f"{both} of {len(rows)} sequences are trained on{where}")
