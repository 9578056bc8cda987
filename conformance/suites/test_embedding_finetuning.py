"""EMB, continued: fine-tuning on frozen and quantised weights, with and without StableEmbedding."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from conformance.checks import decay, embedding, finetuning
from conformance.checks.comparison import states_equal, tensors_equal
from conformance.clause import clause
from conformance.errors import NotApplicable, Violation, quoted
from conformance.recipe import QUANTISATIONS, OptimizerChoice, Recipe
from conformance.recording.snapshot import equal_values, find_logits
from conformance.recording.trace import Trace
from conformance.runs import Runs
from conformance.suites import ADAMW, EIGHT_BIT, STILL, require_still, saved, shapes

# 64 wide: bitsandbytes 0.50.2 quantises other widths wrongly on the CPU. The base has learned its tokens by heart, so
# its loss is far from that of random weights.
BASE = Recipe(n_embd=64, updates=12, save_every=12, same_batches=True)
TUNED = Recipe(n_embd=64, updates=4)
RELATIVE = 1e-4  # of logits in float32; healthy runs show 7.4e-7, the weakest mutant 0.48


def starts(runs: Runs, recipe: Recipe = TUNED) -> list[Recipe]:
    """Return a recipe for each shape that fine-tunes a model of that shape, which the stack itself has trained."""
    found = []
    for shaped in shapes(runs, recipe):
        base = saved(runs.trace(replace(BASE, shape=shaped.shape)), BASE.updates)
        found.append(replace(shaped, finetune=base))
    return found


def tuned(runs: Runs, recipe: Recipe) -> Trace:
    """Return the trace of a run that fine-tunes. Raises NotApplicable if it has no adapters."""
    run = runs.trace(recipe)
    finetuning.has_adapters(runs.trace(replace(BASE, shape=recipe.shape)).tensors, run.tensors)
    return run


def variants(runs: Runs, recipe: Recipe) -> Iterator[tuple[Recipe, Trace]]:
    """Yield the recipe, and also with quantised weights and with StableEmbedding, where the stack has them, each with
    its trace. A variant that the stack refuses is left out.

    Raises:
        NotApplicable: if it refuses all of them.
    """
    wanted = [recipe]
    if runs.has("quantised"):
        wanted.append(replace(recipe, quantised="nf4"))
    if runs.has("stable-embedding") and not recipe.stable_embedding:
        wanted += [replace(each, stable_embedding=True, optimizer=EIGHT_BIT) for each in wanted]
    refusals = []
    for each in wanted:
        try:
            run = tuned(runs, each)
        except NotApplicable as refusal:  # some stacks swap only if they quantise, or quantise only in one precision
            refusals.append(refusal)
        else:
            yield each, run
    if len(refusals) == len(wanted):
        raise refusals[0]


@clause(
    "EMB-9",
    since="0.2",
    needs=("finetune", "quantised"),
    packages=("bitsandbytes",),
    why="If quantised weights change, adapters are trained beside weights that nobody keeps: the model that is served "
    "is not the one that was tuned.",
    mend="Freeze the packed weights, and keep evaluation and saving from packing them again.",
    source="QLoRA (arXiv:2305.14314); bitsandbytes 0.50.2 packs weights anew in evaluation on some processors",
)
def test_quantised_weights_stay(runs: Runs) -> None:
    """Fine-tuning keeps quantised weights frozen: training and evaluation leave them unchanged, bit for bit, in every
    kind of quantisation that the stack takes.
    """
    more = replace(TUNED, evaluate_every=2) if runs.has("evaluate-every") else TUNED
    refusals, judged = [], 0
    for kind in QUANTISATIONS:
        try:
            for recipe in starts(runs, replace(more, quantised=kind)):
                run = tuned(runs, recipe)
                decay.unmoved(run.initial, run.update(-1).after, finetuning.quantised(run.tensors))
                judged += 1
        except NotApplicable as refusal:  # Fabric's int8, say, takes float16 only
            refusals.append(refusal)
    if not judged:
        raise refusals[0]


@clause(
    "EMB-10",
    since="0.2",
    needs=("finetune",),
    why="A trainable tensor that is in no group is never trained, and nothing says so.",
    mend="First swap the embedding, quantise and add adapters; build the optimizer last.",
    source="litgpt finetune/lora.py builds the optimizer, then swaps the embedding in",
    bound="exactly once; bit inequality after four updates",
)
def test_trainable_tensors_are_owned(runs: Runs) -> None:
    """In fine-tuning, each trainable tensor (of the adapters, and of a swapped embedding) is in exactly one parameter
    group, exactly once, and moves.
    """
    for start in starts(runs):
        for _, run in variants(runs, start):
            groups = [group.tensors for group in run.update(0).groups]
            decay.covered_once(groups, run.trainable)
            decay.moved(run.initial, run.update(-1).after, run.trainable)


@clause(
    "EMB-11",
    since="0.2",
    needs=("finetune",),
    level="should",
    why="An optimizer that owns frozen weights keeps them in memory, and moves them if it decays everything it owns.",
    mend="Give the optimizer only the parameters that require a gradient.",
    source="litgpt finetune/lora.py passes model.parameters()",
    bound="membership",
)
def test_frozen_tensors_are_not_owned(runs: Runs) -> None:
    """In fine-tuning, no parameter group holds a frozen or quantised tensor, or one that the model does not use."""
    for start in starts(runs):
        for _, run in variants(runs, start):
            decay.only_these([group.tensors for group in run.update(0).groups], run.trainable)


@clause(
    "EMB-12",
    since="0.2",
    needs=("finetune", "stable-embedding"),
    packages=("bitsandbytes",),
    why="A swap that unfreezes weights trains another model than the one that the user asked for.",
    mend="Copy requires_grad from the old embedding to the new one, and change it nowhere else.",
    source="litgpt finetune/lora.py: the new module is trainable whatever was frozen",
    bound="membership; bit equality of frozen tensors",
)
def test_frozen_stays_frozen_across_the_swap(runs: Runs) -> None:
    """With StableEmbedding, fine-tuning trains the same tensors as without it, apart from the embedding and its norm,
    and leaves all other tensors unchanged.
    """
    for start in starts(runs, replace(TUNED, optimizer=EIGHT_BIT, stable_embedding=True)):
        for recipe, stable in variants(runs, start):
            plain = tuned(runs, replace(recipe, stable_embedding=False))
            finetuning.frozen_alike(plain.trainable, stable.trainable, embedding.swapped(stable.embeddings))
            for run in (plain, stable):
                decay.unmoved(run.initial, run.update(-1).after, set(run.tensors) - set(run.trainable))


@clause(
    "EMB-13",
    since="0.2",
    needs=("finetune", "stable-embedding"),
    packages=("bitsandbytes",),
    why="StableEmbedding exists to avoid 8-bit state for the embedding, and 32-bit state for adapters costs memory.",
    mend="Before the first step, register the 32-bit override for the live weight of the swapped embedding, and for no "
    "other.",
    source="bitsandbytes#1269; litgpt finetune/lora.py: the swapped table has no state at all",
    bound="dtype of the state",
)
def test_state_of_the_swapped_table_only_is_wide(runs: Runs) -> None:
    """In fine-tuning under an 8-bit optimizer, the swapped embedding has 32-bit state, and large adapters have 8-bit
    state.
    """
    wide = replace(TUNED, lora_rank=64, optimizer=EIGHT_BIT, stable_embedding=True)  # 64 x 64: the smallest in 8 bits
    for start in starts(runs, wide):
        for _, run in variants(runs, start):
            names = embedding.swapped(run.embeddings)
            if not names:
                raise Violation("a StableEmbedding, since the option is on and the optimizer from bitsandbytes", "none")
            embedding.state_bits(run.update(-1).state_after, run.tensors, {f"{name}.weight" for name in names})


@clause(
    "EMB-14",
    since="0.2",
    needs=("finetune", "resume"),
    why="A run that goes on with other adapters, other scales or a new norm is not the run that was interrupted.",
    mend="Save the adapters, the swapped embedding, the packed weights with their scales, the optimizer state, and how "
    "they fit together.",
    source="litgpt save_lora_checkpoint keeps only lora_ keys",
)
def test_fine_tuning_resumes(runs: Runs) -> None:
    """A fine-tuning run that is interrupted and resumed from its checkpoint is equal, bit for bit, to one that was
    never interrupted.
    """
    for start in starts(runs, replace(TUNED, save_every=2)):
        for recipe, whole in variants(runs, start):
            resumed = tuned(runs, replace(recipe, resume=saved(whole, 2)))
            if len(resumed.updates) != 2:
                raise Violation("2 updates after a resume from update 2 of 4", f"{len(resumed.updates)} updates")
            tensors_equal(whole.update(2).before, resumed.update(0).before, "weights at the resume")
            states_equal(whole.update(2).state_before, resumed.update(0).state_before, "optimizer state at the resume")
            same_function(whole, resumed)
            tensors_equal(whole.update(-1).after, resumed.update(-1).after, "weights at the end")


def same_function(whole: Trace, resumed: Trace) -> None:
    """Check that the first logits after a resume are those of the run that went on; the named tensors are equal.

    Raises:
        Violation: if not: then something that has no name among the tensors was lost.
    """
    before, after = whole.training_forwards(2), resumed.training_forwards(0)
    if not before or not after or before[0].logits is None or after[0].logits is None:
        return
    if error := finetuning.relative_difference(before[0].logits, after[0].logits):
        raise Violation(
            "the same logits after the resume as in the run that went on",
            f"they differ by {error:.2g} although all tensors of the model are equal: the scales of quantised weights, "
            "or something else beside the tensors, were not restored",
        )


@clause(
    "EMB-15",
    since="0.2",
    needs=("finetune", "load"),
    why="A run that silently starts from a damaged model spends its first updates on repairing the damage.",
    mend="Start adapters at zero; set a new norm so that it changes the table least; print how far the first loss "
    "moves.",
    source="bitsandbytes StableEmbedding before a pretrained table; litgpt finetune/lora.py",
    bound="1e-4 nats per token, unless a message says how the loss moves; healthy 0, weakest mutant 0.16",
)
def test_first_loss_is_that_of_the_base(runs: Runs) -> None:
    """The first loss of a fine-tuning run equals that of the model it starts from; if StableEmbedding changes it, the
    stack says by how much.
    """
    for start in starts(runs):
        base = base_loss(runs, start)
        for recipe, run in variants(runs, start):
            if recipe.quantised is not None:
                if not recipe.stable_embedding:
                    continue  # EMB-18
                without = first_loss(tuned(runs, replace(recipe, stable_embedding=False)), recipe)
                if abs(first_loss(run, recipe) - without) <= finetuning.UNSAID:
                    continue  # the swap moves nothing
            finetuning.same_first_loss(
                base, first_loss(run, recipe), run.messages, partial(changed_at_start, runs, recipe, run)
            )


def changed_at_start(runs: Runs, recipe: Recipe, run: Trace) -> list[str]:
    """Return the tensors that are not those of the model that a run starts from."""
    base = runs.trace(replace(BASE, shape=recipe.shape))
    return finetuning.other_than_base(base.update(-1).after, run.initial)


def first_loss(run: Trace, recipe: Recipe) -> float:
    """Return the loss of the first forward in training, in nats per token. Raises Violation if there is none."""
    forwards = run.training_forwards(0)
    if not forwards:
        raise Violation("a forward in training before the first update", "there is none")
    return loss_of(forwards[0].scores, recipe)


def base_loss(runs: Runs, recipe: Recipe) -> float:
    """Return the loss, on the first tokens of a recipe, of the model that it starts from."""
    assert recipe.finetune is not None
    with torch.no_grad():
        logits = find_logits(runs.load(recipe.finetune)(recipe.batches()[0][:, :-1]))
    assert logits is not None, "load() gives a plain module"
    return loss_of(logits, recipe)


def loss_of(logits: torch.Tensor, recipe: Recipe) -> float:
    """Return the loss of logits for the first targets of a recipe.

    A stack that shifts the targets inside the sequence gives one position more, for which there is none.
    """
    targets = recipe.labels()[0][:, 1:]
    return float(F.cross_entropy(logits[:, : targets.size(1)].float().flatten(0, 1), targets.flatten()))


@clause(
    "EMB-16",
    since="0.2",
    needs=("finetune", "load", "evaluate"),
    why="If adapters, scales or the norm behind the lookup are lost on the way, the model that is served is not the "
    "one that was tuned.",
    mend="Merge the adapters into the weights that they were trained beside, and fold the norm into the table.",
    source="litgpt save_lora_checkpoint keeps only lora_ keys; merge_lora merges into weights that were not quantised",
    bound="1e-4 of the norm of float32 logits; healthy 7.4e-7 (sums in another order), weakest mutant 0.48",
)
def test_tuned_model_loads_as_trained(runs: Runs) -> None:
    """A fine-tuned model loaded for inference has plain embeddings and gives the same logits as the trained model."""
    for start in starts(runs, replace(TUNED, save_every=4, evaluate=True)):
        for _, run in variants(runs, start):
            evaluated = [f for f in run.forwards if f.update == 4 and not f.training]
            if not evaluated:
                raise Violation("an evaluation after the last update", "no forward in eval mode")
            module = runs.load(saved(run, 4))
            kinds = {type(child).__name__ for child in module.modules() if isinstance(child, nn.Embedding)}
            if kinds != {"Embedding"}:
                raise Violation("plain nn.Embedding in the loaded model", ", ".join(sorted(kinds)))
            with torch.no_grad():
                found = find_logits(module(evaluated[0].ids.long()))
            assert found is not None, "load() gives a plain module"
            error = finetuning.relative_difference(evaluated[0].scores, found)
            if not error <= RELATIVE:
                why = finetuning.other_scale(module, run.update(-1).after, evaluated[0].ids.long(), evaluated[0].scores)
                raise Violation(
                    "logits of the loaded model within 1e-4 of the trained one's", f"they are {error:.2g} away{why}"
                )


@clause(
    "EMB-17",
    since="0.2",
    needs=("finetune",),
    why="Adapters in 16 bits under a precision that promises float32 weights lose small updates to rounding.",
    mend="Cast the adapters to the dtype of the precision: libraries give them the dtype that a layer computes in.",
    source="peft 0.21 takes the dtype that a quantised layer computes in",
    bound="dtypes",
)
def test_dtypes_in_fine_tuning(runs: Runs) -> None:
    """In every precision that the stack offers for fine-tuning, trained tensors are stored in the dtype of that
    precision or in float32, and a model with float32 weights gives logits in float32.
    """
    for precision in runs.precisions():
        optimizer = OptimizerChoice() if precision != "16-mixed" else OptimizerChoice.of("torch.optim.SGD", lr=0.1)
        declared = torch.bfloat16 if precision == "bf16-true" else torch.float32
        for start in starts(runs, replace(TUNED, precision=precision, optimizer=optimizer)):
            for _, run in variants(runs, start):
                finetuning.storage(run.tensors, declared)
                kinds = {f.logits.dtype for f in run.training_forwards() if f.logits is not None and not f.inside}
                # PREC-1 asks for them under bf16-true as well.
                if runs.has("float32-logits") and precision != "bf16-true" and kinds - {torch.float32}:
                    raise Violation(f"float32 logits under {precision}", ", ".join(map(str, kinds)))


@clause(
    "EMB-18",
    since="0.2",
    needs=("finetune", "quantised", "load"),
    packages=("bitsandbytes",),
    level="should",
    why="Four bits damage some models more than others; a user who is not told takes the damaged loss for the model's "
    "own.",
    mend="Compute the first loss with and without quantised weights, and print both.",
    source="QLoRA (arXiv:2305.14314); reports/findings/bitsandbytes-cpu-4bit-columns.py",
    bound="1e-4 nats per token, unless a message says how the loss moves; healthy 1.7e-3, and said",
)
def test_what_quantised_weights_change_is_told(runs: Runs) -> None:
    """If quantised weights change the first loss of a fine-tuning run, the stack says how far it is from that of the
    model the run starts from.
    """
    for start in starts(runs, replace(TUNED, quantised="nf4")):
        run = tuned(runs, start)
        finetuning.same_first_loss(base_loss(runs, start), first_loss(run, start), run.messages)


@clause(
    "EMB-19",
    since="0.2",
    needs=("finetune",),
    why="A tensor of the model that is trained beside the adapters is not in the adapters' file: whoever loads them "
    "beside the original model gets another function.",
    mend="Freeze every parameter of the model first, and then add the adapters; unfreeze embeddings only.",
    source="changjonathanc/minLoRA#2 (what is frozen beside LoRA), huggingface/peft: bias and modules_to_save",
    bound="membership",
)
def test_only_adapters_are_trained(runs: Runs) -> None:
    """Fine-tuning trains the adapters, and of the model that it starts from nothing but embeddings."""
    for start in starts(runs):
        base = runs.trace(replace(BASE, shape=start.shape)).tensors
        for _, run in variants(runs, start):
            finetuning.base_frozen(run.tensors, base, [info.name for info in run.embeddings])


def still_tuning(runs: Runs) -> list[Recipe]:
    """Return two updates of fine-tuning that move nothing, on equal tokens, with all options that the subject has."""
    recipe = replace(
        TUNED, updates=2, same_batches=True, optimizer=OptimizerChoice.of(ADAMW, lr=STILL, weight_decay=0.0)
    )
    recipe = replace(recipe, lora_dropout=0.5) if runs.has("lora-dropout") else recipe
    return starts(runs, replace(recipe, tuned_embedding=True) if runs.has("tuned-embedding") else recipe)


@clause(
    "EMB-20",
    since="0.2",
    needs=("finetune", "lora-dropout"),
    why="Adapters that are trained without the configured dropout learn a small data set by heart.",
    mend="Pass the probability on to the adapters, and call train() after they were added. If your adapters never "
    "drop, name lora-dropout in lacks.",
    source="ml-explore/mlx-examples#622 (rank, alpha and dropout are not those of the configuration)",
    bound="different bits",
)
def test_adapters_drop(runs: Runs) -> None:
    """In fine-tuning with dropout of the adapters, two updates on equal tokens and weights have different gradients."""
    for recipe in still_tuning(runs):
        run = tuned(runs, recipe)
        runs.require_read(recipe, "lora_dropout", "lora-dropout")
        require_still(run)
        first, second = run.update(0).gradients, run.update(1).gradients
        # A factor that starts at 0 hides the other one's gradient, until a step of 1e-30 has moved it.
        learning = [name for name, found in first.items() if found is not None and bool(found.any())]
        if all(equal_values(first[name], second[name]) for name in learning):
            raise Violation(
                f"{recipe.shape}: dropout of the adapters draws another mask for each update",
                "the gradients of equal tokens are equal: the same mask, or none",
            )


@clause(
    "EMB-21",
    since="0.2",
    needs=("finetune", "tuned-embedding"),
    why="New words, or words of another language, are never learned if the embedding stays frozen, and nothing says "
    "so.",
    mend="Unfreeze the embedding, or train a copy of it, before the optimizer is built. If your stack has no such "
    "option, name tuned-embedding in lacks.",
    source="huggingface/peft#951 (what stands in modules_to_save is not trained)",
    bound="membership, and a gradient above 0",
)
def test_embedding_is_tuned_if_asked(runs: Runs) -> None:
    """If the user asks fine-tuning to train the embedding too, the optimizer owns it, and it has a gradient."""
    for recipe in still_tuning(runs):
        run = tuned(runs, recipe)
        runs.require_read(recipe, "tuned_embedding", "tuned-embedding")
        update = run.update(0)
        tables = {f"{info.name}.weight" for info in run.embeddings if info.shape[0] >= recipe.vocab_size}
        owned = {name for step in update.steps for name in step.tensors if tables.intersection(run.tensors[name].names)}
        gradients = [update.gradients[name] for name in owned]
        if not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
            raise Violation(
                f"{recipe.shape}: an embedding that the optimizer owns, with a gradient",
                "the optimizer owns no embedding" if not owned else f"no gradient for {quoted(sorted(owned))}",
            )


@clause(
    "EMB-23",
    since="0.2",
    needs=("finetune", "lora-everywhere"),
    why="Adapters on a part of the layers learn less, and a pattern of names that fits no layer of a new model is an "
    "error that nobody sees.",
    mend="Find the layers by their type, and raise an error for a pattern that fits none. If your stack adds adapters "
    "to some layers only, name lora-everywhere in lacks.",
    source="unslothai/unsloth-zoo#1150 (only some linear layers get adapters, without a word)",
    bound="membership",
)
def test_adapters_everywhere(runs: Runs) -> None:
    """Fine-tuning adds adapters beside every linear layer of the blocks, in attention and in the MLP."""
    for start in starts(runs):
        base = runs.trace(replace(BASE, shape=start.shape)).tensors
        for _, run in variants(runs, start):
            finetuning.adapted_everywhere(base, run.tensors)
