"""EMB, the end: what fine-tuning trains: adapters, and nothing besides, unless its user asks for it."""

from dataclasses import replace

from conformance.checks import finetuning
from conformance.clause import clause
from conformance.errors import Violation, quoted
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.snapshot import equal_values
from conformance.runs import Runs
from conformance.suites import ADAMW, STILL, require_still
from conformance.suites.test_embedding_finetuning import BASE, TUNED, base_loss, first_loss, starts, tuned, variants


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
    why="Adapters on only some of the layers learn less, and nobody notices when a pattern of names matches no layer "
    "of a new model.",
    mend="Find the layers by their type, and raise an error if a pattern matches none. If your stack adds adapters "
    "to some layers only, name lora-everywhere in lacks.",
    source="unslothai/unsloth-zoo#1150 (only some linear layers get adapters, without a word)",
    bound="membership",
)
def test_adapters_everywhere(runs: Runs) -> None:
    """Fine-tuning adds adapters to every linear layer of the blocks, in attention and in the MLP."""
    for start in starts(runs):
        base = runs.trace(replace(BASE, shape=start.shape)).tensors
        for _, run in variants(runs, start):
            finetuning.adapted_everywhere(base, run.tensors)
