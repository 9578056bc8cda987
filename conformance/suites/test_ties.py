"""TIE: where embedding and head are tied, they are one tensor and stay one."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from conformance.checks.accumulation import gradients_agree, scale_of
from conformance.checks.comparison import tensors_equal
from conformance.checks.data import sample_numbers
from conformance.checks.ties import lookup_and_head_learn
from conformance.clause import clause
from conformance.errors import NotApplicable, Violation, quoted
from conformance.recipe import Recipe
from conformance.recording.trace import TensorInfo, Trace
from conformance.runs import Runs
from conformance.suites import each_unless_refused, everyday, on_two_ranks, paired, saved, shapes
from conformance.suites.test_accumulation import dense, in_one_batch, small_step, small_steps
from conformance.suites.test_embedding_finetuning import BASE, TUNED, tuned
from conformance.suites.test_precision_numbers import computes_with_its_weights, fast
from conformance.suites.test_resume import resumed, same_after


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
    bound="number of elements; bit equality",
)
def test_tied_after_resume(runs: Runs) -> None:
    """If embedding and head are tied, they are still one tensor after a resume, and the run goes on as if it had not
    been interrupted, bit for bit.
    """
    recipe = Recipe(shape=shapes(runs)[0].shape, tied=True, updates=4, save_every=2)
    whole = runs.trace(recipe)
    later = resumed(runs, recipe, whole, 2)
    for what, tensors in (("start", later.initial), ("end", later.update(-1).after)):
        if size(tensors) != size(whole.initial):
            raise Violation(f"{size(whole.initial)} elements at the {what} of the resumed run", f"{size(tensors)}")
    if runs.asks("0.2") and same_sequences(whole, later):  # other ones are RESUME-2's
        for number, one, other in paired(whole.updates[2:], later.updates, "the resumed run with tied weights"):
            same_after(one, other, f"parameters after update {number + 2} of the resumed run, tied weights")


def same_sequences(whole: Trace, later: Trace) -> bool:
    """Return whether a run resumed after update 2 trains on the sequences of the run that was never interrupted."""
    found = [f.ids for f in whole.training_forwards() if f.update >= 2], [f.ids for f in later.training_forwards()]
    return len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


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


@clause(
    "TIE-5",
    since="0.2",
    needs=("tied", "untied"),
    why="A tied table has two gradients, one of the lookup and one of the head. If they are averaged, or counted "
    "twice, the largest tensor of the model trains as if at another learning rate.",
    mend="Let autograd add the two up, in every microbatch, and leave the sum as it is.",
    source="tag1consulting/feste#6, NVIDIA/Megatron-LM#299 (averaged), paiml/entrenar#314 (stepped once for each)",
    bound="twice as ACC-5 for the fall of the loss (healthy: 2e-4; weakest mutant, half the gradient of the table: "
    "0.1), and as ACC-1 for microbatches",
)
def test_gradient_of_a_tied_table(runs: Runs) -> None:
    """If embedding and head are tied, the gradient is that of the same loss as without the tie, and it stays the
    same if an update is split into microbatches.
    """
    if runs.policy.auxiliary_loss(Recipe(tied=True)):
        raise NotApplicable("the policy declares that the loss has terms besides the cross entropy")
    for plain in shapes(runs, small_step(runs)):
        both = [replace(plain, tied=tied) for tied in (False, True)]
        found = [scale_of(*small_steps(recipe, runs.trace(recipe)), "the gradient") for recipe in both]
        (without, rough), (scale, bound) = found
        if not abs(scale / without - 1) <= rough + bound:
            raise Violation(
                f"{plain.shape}: tied weights change the scale of the gradient by less than {rough + bound:.2g}, "
                "judged by how much a small step along it lowers the loss",
                f"with a head of its own, the gradient is {without:.4g} times that of the mean cross entropy; with "
                f"tied weights it is {scale:.4g} times that",
            )
    if runs.has("microbatches"):
        split = replace(everyday(runs), tied=True)
        one, other = (runs.trace(recipe).update(0).gradients for recipe in (in_one_batch(split), split))
        gradients_agree(one, other, f"tied weights, {split.microbatches} microbatches against one batch")


@clause(
    "TIE-6",
    since="0.2",
    needs=("tied", "untied", "two-ranks"),
    why="A tied table that the ranks do not exchange, or exchange twice, differs from rank to rank, or learns at "
    "another rate than everything else.",
    mend="Tie before the model is wrapped for several ranks, so that the table is exchanged once, after both of its "
    "gradients are there.",
    source="NVIDIA/Megatron-LM#299 (gradients of a tied table on several ranks)",
    bound="as ACC-3",
)
def test_tied_on_two_ranks(runs: Runs) -> None:
    """If embedding and head are tied, two ranks have the same gradient as one process on all of the sequences, and
    after every update the same parameters, bit for bit.
    """
    recipe = replace(everyday(runs), tied=True)
    one, (first, second) = runs.trace(recipe), runs.ranks(on_two_ranks(recipe))
    for number, update, other in paired(first.updates, second.updates, "rank 1 makes as many updates as rank 0"):
        where = f"after update {number} with tied weights, rank 0 against rank 1"
        tensors_equal(dense(update.gradients), dense(other.gradients), f"gradients {where}")
        tensors_equal(update.after, other.after, f"parameters {where}")
    what = "tied weights, two ranks against one process"
    gradients_agree(one.update(0).gradients, first.update(0).gradients, what)


@clause(
    "TIE-7",
    since="0.2",
    needs=("tied", "finetune", "tuned-embedding"),
    why="If fine-tuning trains a copy of a tied embedding, the head stays as it was: the model learns to read new "
    "tokens, but not to write them.",
    mend="Train the tied tensor itself, or let the head use the copy, too; peft has ensure_weight_tying for it.",
    source="unslothai/unsloth#3711, #9331 (a trained embedding has a copy of its own, and the head stays as it was)",
    bound="identity of tensors",
)
def test_tied_in_fine_tuning(runs: Runs) -> None:
    """If embedding and head are tied, and fine-tuning trains the embedding too, both stay one tensor."""
    recipe = shapes(runs, replace(TUNED, updates=2, tied=True))[0]  # tables are the same in both
    start = runs.trace(replace(BASE, shape=recipe.shape, tied=True))
    if not any(is_tied(start, info) for info in start.tensors.values()):
        raise NotApplicable("the head of the model that is fine-tuned has no name of its own for the table")
    recipe = replace(recipe, finetune=saved(start, BASE.updates), tuned_embedding=True)
    run = tuned(runs, recipe)
    runs.require_read(recipe, "tuned_embedding", "tuned-embedding")
    tables = [info for info in run.tensors.values() if info.shape == (recipe.vocab_size, recipe.n_embd)]
    trained = [info for info in tables if info.trainable]
    if not trained:
        raise NotApplicable("fine-tuning trains no table as a whole: see EMB-21")
    apart = [info.name for info in trained if not is_tied(run, info)]
    if apart:
        raise Violation(
            f"{recipe.shape}: one tensor for embedding and head, as in the model that is fine-tuned",
            f"{quoted(apart)} is trained, and is one of them alone",
        )


def is_tied(run: Trace, info: TensorInfo) -> bool:
    """Return True if a tensor has a name in an embedding and another one elsewhere."""
    tables = tuple(f"{table.name}." for table in run.embeddings)
    inside = [name.startswith(tables) for name in info.names]
    return any(inside) and not all(inside)


@clause(
    "TIE-8",
    since="0.2",
    needs=("tied", "load"),
    why="A model that is served with a head other than the one it was trained with answers with noise.",
    mend="Save the table once, and tie again when you load.",
    source="NVIDIA-NeMo/Automodel#2511 (a head of its own is loaded), mosaicml/examples#11",
    bound="1e-4 of the norm of the logits (healthy: 0; a head drawn anew: 1)",
)
def test_tied_model_loads_as_trained(runs: Runs) -> None:
    """If embedding and head are tied, the model in a checkpoint gives the logits of the trained model."""
    computes_with_its_weights(runs, replace(fast(runs), tied=True), bound=1e-4)
