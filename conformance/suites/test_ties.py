"""TIE: where embedding and head are tied, they are one tensor and stay one."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from conformance.checks.data import sample_numbers
from conformance.checks.ties import lookup_and_head_learn
from conformance.clause import clause
from conformance.errors import NotApplicable, Violation, quoted
from conformance.recipe import Recipe
from conformance.runs import Runs
from conformance.suites import each_unless_refused, shapes
from conformance.suites.test_resume import resumed


def size(tensors: Mapping[str, Tensor]) -> int:
    """Return elements of distinct tensors."""
    return sum(tensor.numel() for tensor in tensors.values())


@clause(
    "TIE-1",
    since="0.1",
    needs=("tied",),
    why="An untied model has more parameters and other gradients; if two tensors only share memory, it is updated "
    "twice.",
    mend="Assign one Parameter to both names, and do so last: to_empty(), assign=True and wrappers give each name a "
    "tensor of its own.",
    source="facebookresearch/lingua#75, verl#7834, NVIDIA-NeMo/Automodel#2213, torchtune#616",
    bound="number of elements",
)
def test_one_tensor(runs: Runs) -> None:
    """If embedding and head are tied, they are one tensor, from the start and after every update, in 32 and in 16
    bits.
    """
    found = shapes(runs, Recipe(tied=True))
    coarse = [replace(found[0], precision=name) for name in runs.precisions() if name != "32-true"]
    each_unless_refused([*found, *coarse] if runs.asks("0.2") else found, lambda recipe: one_tensor(runs, recipe))


def one_tensor(runs: Runs, recipe: Recipe) -> None:
    """Check that a run with tied weights has as many elements fewer than one without as a table has."""
    where = f"{recipe.shape}, {recipe.precision}"
    tied, untied = runs.trace(recipe), runs.trace(replace(recipe, tied=False))
    table = recipe.vocab_size * recipe.n_embd
    saved = size(untied.initial) - size(tied.initial)
    always = saved == 0 and any(len(info.names) > 1 for info in tied.tensors.values())  # whatever was asked for
    if not always and not table <= saved <= table + recipe.vocab_size:  # a head of its own may have a bias
        raise Violation(
            f"{where}: {table} elements fewer than untied, a table of {recipe.vocab_size} x {recipe.n_embd}",
            f"{size(tied.initial)} elements tied, {size(untied.initial)} untied",
        )
    for number, update in enumerate(tied.updates, start=1):
        if size(update.after) != size(tied.initial):
            raise Violation(f"{where}: {size(tied.initial)} elements after update {number}", f"{size(update.after)}")


@clause(
    "TIE-2",
    since="0.1",
    needs=("tied", "resume"),
    why="After the resume the two tensors train apart, and nothing says so.",
    mend="Copy into the parameters instead of replacing them, or tie again after loading.",
    source="facebookresearch/lingua#75, mosaicml/examples#11",
    bound="number of elements",
)
def test_tied_after_resume(runs: Runs) -> None:
    """If embedding and head are tied, they are still one tensor after a resume."""
    recipe = Recipe(shape=shapes(runs)[0].shape, tied=True, updates=4, save_every=2)
    whole = runs.trace(recipe)
    later = resumed(runs, recipe, whole, 2)
    for what, tensors in (("start", later.initial), ("end", later.update(-1).after)):
        if size(tensors) != size(whole.initial):
            raise Violation(f"{size(whole.initial)} elements at the {what} of the resumed run", f"{size(tensors)}")


@clause(
    "TIE-3",
    since="0.2",
    needs=("tied",),
    why="If only the head, or only the lookup, gives the tied table a gradient, it learns half of what it should, and "
    "logits and loss show nothing.",
    mend="Detach neither the lookup nor the head: the gradient of the table is the sum of both.",
    source="paiml/entrenar#314 (the gradients of a tied tensor are not added up)",
    bound="1e-2 of what the head gives the row of a token that is looked up (healthy: 12 and more; weakest mutant, a "
    "lookup without gradient: 2e-7)",
)
def test_lookup_and_head_learn(runs: Runs) -> None:
    """If embedding and head are tied, the gradient of their table comes from the lookup and from the head."""
    for recipe in shapes(runs, Recipe(tied=True, microbatch_size=1, updates=1)):
        run, (rows, *_) = runs.trace(recipe), recipe.batches()
        table = next((f"{i.name}.weight" for i in run.embeddings if i.shape[0] >= recipe.vocab_size), None)
        name = next((name for name, info in run.tensors.items() if table in info.names), "")
        gradient = run.update(0).gradients.get(name)
        found = run.training_forwards(0)
        read = [n for forward in found for n in sample_numbers(forward.ids, rows)]
        if gradient is None or read != [0] or gradient.ndim != 2 or found[0].logits is None:
            raise NotApplicable("the first gradient of an embedding on the one sequence asked for was not seen")
        logits = found[0].scores[0, : recipe.block_size, : len(gradient)]
        inputs, targets = set(rows[0, :-1].tolist()), set(rows[0, 1:].tolist())
        unseen = set(range(recipe.vocab_size)) - inputs - targets
        lookup_and_head_learn(gradient, logits, sorted(inputs - targets), sorted(unseen))


@clause(
    "TIE-4",
    since="0.2",
    needs=("tied", "untied"),
    why="A user who asks for a head of its own trains a smaller model, with other gradients, and compares it with "
    "larger ones.",
    mend="Tie only if the configuration says so. If your stack always ties, name untied in lacks.",
    source="mosaicml/llm-foundry#728 (tie_word_embeddings=False does nothing)",
    bound="identity of tensors",
)
def test_head_of_its_own(runs: Runs) -> None:
    """If embedding and head are not to be tied, they are two tensors."""
    for recipe in shapes(runs):
        run = runs.trace(recipe)
        tables = {f"{info.name}.weight" for info in run.embeddings}
        for info in run.tensors.values():
            others = sorted(set(info.names) - tables)
            if others and tables.intersection(info.names):
                raise Violation(
                    f"{recipe.shape}: two tensors, as the head is not to be tied to the embedding",
                    f"{info.name} and {quoted(others)} are one tensor",
                )
