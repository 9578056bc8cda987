"""EMB: nn.Embedding becomes StableEmbedding for training with bitsandbytes, without loss, and plain again after."""

from dataclasses import replace

import torch
from torch import nn

from conformance.checks import decay, embedding
from conformance.checks.comparison import tensors_equal
from conformance.clause import clause
from conformance.errors import Violation, describe_error
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.snapshot import find_logits
from conformance.recording.trace import Trace
from conformance.runs import Runs
from conformance.suites import ADAMW_8BIT, EIGHT_BIT, saved, shapes
from conformance.suites.test_decay import check_factors

STABLE = Recipe(optimizer=EIGHT_BIT, stable_embedding=True)
OPTIONS = "conformance.probes:EmbeddingOptions"


def weights(run: Trace) -> dict[str, torch.Tensor]:
    """Return the initial weight of each embedding."""
    return {info.name: run.initial[f"{info.name}.weight"] for info in run.embeddings}


def require_swap(run: Trace) -> list[str]:
    """Return names of the swapped embeddings. Raises Violation if there are none."""
    names = embedding.swapped(run.embeddings)
    if not names:
        kinds = ", ".join(f"{info.name}: {info.kind}" for info in run.embeddings)
        raise Violation("a StableEmbedding, since the option is on and the optimizer from bitsandbytes", kinds)
    return names


@clause(
    "EMB-1",
    packages=("bitsandbytes",),
    since="0.1",
    needs=("stable-embedding",),
    why="StableEmbedding's own random draw replaces the initialisation or the pretrained table.",
    mend="Put the old weight into the new module before anything else uses it.",
    source="Lightning-AI/litgpt#1769, #1770",
)
def test_weights_survive_swap(runs: Runs) -> None:
    """Swapping in StableEmbedding keeps every embedding weight bit for bit, in every dtype of weights that the stack
    offers.
    """
    for name in runs.precisions():
        if not name.endswith("-true"):
            continue
        for recipe in shapes(runs, Recipe(optimizer=EIGHT_BIT, precision=name)):
            plain, stable = runs.trace(recipe), runs.trace(replace(recipe, stable_embedding=True))
            require_swap(stable)
            tensors_equal(weights(plain), weights(stable), f"embedding weights across the swap under {name}")


@clause(
    "EMB-2",
    packages=("bitsandbytes",),
    since="0.1",
    needs=("stable-embedding", "foreign-module"),
    why="The padding row gets gradients, or the table loses its norm limit: the run trains another model.",
    mend="Pass padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device and dtype to the new module.",
    source="litgpt finetune/lora.py passes two of nine arguments",
    bound="equality; or an error that says which option cannot be kept",
)
def test_options_survive_swap(runs: Runs) -> None:
    """Swapping in StableEmbedding keeps padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device and
    dtype.
    """
    recipe = replace(STABLE, module=OPTIONS)
    plain, stable = runs.trace(replace(recipe, stable_embedding=False)), runs.trace(recipe)
    require_swap(stable)
    if len(plain.embeddings) != len(stable.embeddings):
        raise Violation(f"{len(plain.embeddings)} embeddings after the swap", f"{len(stable.embeddings)} embeddings")
    for before, after in zip(plain.embeddings, stable.embeddings, strict=True):
        found = dict(after.options) | {"device": after.device, "dtype": after.dtype, "shape": after.shape}
        wanted = dict(before.options) | {"device": before.device, "dtype": before.dtype, "shape": before.shape}
        embedding.same_options(wanted, found, before.name)
    sparse = runs.attempt(replace(recipe, module="conformance.probes:sparse_embedding"))
    kept = [dict(info.options)["sparse"] for info in sparse.trace.embeddings]
    # No bitsandbytes optimizer takes sparse gradients, so an error about the option is right too.
    if not (kept and all(kept)) and not (sparse.error is not None and "sparse" in str(sparse.error)):
        seen = describe_error(sparse.error) if sparse.error else f"sparse is {kept}"
        raise Violation("sparse=True is kept, or an error that names it", seen)


@clause(
    "EMB-3",
    packages=("bitsandbytes",),
    since="0.1",
    needs=("stable-embedding",),
    why="If the swap comes after the optimizer is built, or leaves the new table frozen, table and norm are never "
    "trained.",
    mend="Swap before building the optimizer, and let the new table require gradients as the old one did.",
    source="litgpt finetune/lora.py: three tensors in no group, one orphan inside; "
    "huggingface/optimum-graphcore#304 (an embedding made from given weights is frozen)",
    bound="exactly once; bit inequality after four updates",
)
def test_live_tensors_optimised(runs: Runs) -> None:
    """The optimizer owns and trains the table and the norm of the swapped embedding, and holds no tensor of the one it
    replaced.
    """
    for recipe in shapes(runs, replace(STABLE, updates=4)):
        run = runs.trace(recipe)
        stable = require_swap(run)
        if runs.asks("0.2"):
            plain = runs.trace(replace(recipe, stable_embedding=False, updates=2))
            embedding.tables_trained(plain.tensors, run.tensors, stable)
            embedding.norms_trained(run.tensors, stable)
        names = run.trainable
        groups = [group.tensors for group in run.update(0).groups]
        decay.covered_once(groups, names)
        decay.only_these(groups, names)
        decay.moved(run.initial, run.update(-1).after, names)


@clause(
    "EMB-4",
    packages=("bitsandbytes",),
    since="0.1",
    needs=("stable-embedding",),
    why="StableEmbedding exists to avoid 8-bit state for the embedding.",
    mend="Register the override for the live weight, before the first step.",
    source="bitsandbytes#1269, fixed by #1869",
    bound="dtype of the state",
)
def test_state_in_32_bits(runs: Runs) -> None:
    """Under an 8-bit optimizer, every swapped embedding has 32-bit state and every other large tensor has 8-bit
    state.
    """
    # With 128 positions their table is large enough for 8-bit state, too.
    long = shapes(runs, replace(STABLE, block_size=128, updates=1)) if runs.asks("0.2") else []
    for recipe in (*shapes(runs, STABLE), *long):
        run = runs.trace(recipe)
        wide = {f"{name}.weight" for name in require_swap(run)}
        embedding.state_bits(run.update(-1).state_after, run.tensors, wide)


@clause(
    "EMB-5",
    packages=("bitsandbytes",),
    since="0.1",
    needs=("stable-embedding",),
    why="bitsandbytes remembers the override by position, for the whole process, so the next model needs more memory.",
    mend="Give each optimizer an override manager of its own, or clear the singleton after use.",
    source="bitsandbytes 0.50.2 GlobalOptimManager.index2config",
    bound="dtype of the state",
)
def test_override_does_not_leak(runs: Runs) -> None:
    """After a run with StableEmbedding, a later run in the same process without it has 8-bit state for every large
    tensor.
    """
    for recipe in shapes(runs, Recipe(optimizer=EIGHT_BIT, repeat=2)):
        runs.trace(replace(recipe, stable_embedding=True))  # a run of its own, so that it comes right before
        later = runs.trace(recipe)
        embedding.state_bits(later.update(-1).state_after, later.tensors, wide=set())


@clause(
    "EMB-6",
    packages=("bitsandbytes",),
    since="0.1",
    needs=("stable-embedding", "tied"),
    why="A swap that replaces the tensor unties the head: two tables train apart.",
    mend="Keep the same Parameter in the new module, or refuse tied models with a reason.",
    source="facebookresearch/lingua#75; bitsandbytes StableEmbedding copies _weight into a new Parameter",
    bound="identity of the tensor; or an error that speaks of tying",
)
def test_tied_head(runs: Runs) -> None:
    """If the head is tied to the embedding, the swap keeps the tie, or the stack refuses with a reason."""
    tried = runs.attempt(replace(STABLE, tied=True))
    if tried.error is not None:
        if "tie" not in str(tried.error).lower():
            raise Violation("training, or an error that speaks of the tied head", describe_error(tried.error))
        return
    require_swap(tried.trace)
    # Not every tie shows as two names of one tensor: x-transformers multiplies by the embedding's weight directly.
    plain = runs.trace(replace(STABLE, tied=True, stable_embedding=False))
    untied = [n for n, info in plain.tensors.items() if tried.trace.tensors[n].names != info.names]
    if untied:
        seen = "; ".join(f"{' = '.join(plain.tensors[n].names)} before, two tensors after" for n in untied)
        raise Violation("head and embedding are one tensor, as they are without the swap", seen)


@clause(
    "EMB-7",
    since="0.1",
    needs=("stable-embedding",),
    why="StableEmbedding changes the function of the model; without 8-bit state it buys nothing.",
    mend="Check the class of the optimizer before swapping.",
    source="bitsandbytes documentation of StableEmbedding",
    bound="class of the embedding",
)
def test_only_with_bitsandbytes(runs: Runs) -> None:
    """The embedding stays plain if the optimizer is not from bitsandbytes."""
    for recipe in shapes(runs, Recipe(stable_embedding=True)):
        names = embedding.swapped(runs.trace(recipe).embeddings)
        if names:
            raise Violation("plain embeddings under torch.optim.AdamW", f"StableEmbedding: {', '.join(names)}")


@clause(
    "EMB-8",
    packages=("bitsandbytes",),
    since="0.1",
    needs=("stable-embedding", "load", "resume", "evaluate"),
    why="Training and serving use different functions if the norm behind the lookup is dropped.",
    mend="Untie the head, then fold the norm into the table row by row: weight := norm(weight).",
    source="litgpt save_lora_checkpoint keeps only lora_ keys",
    bound="bit equality of float32 logits on the CPU with one thread",
)
def test_export_is_plain_and_equal(runs: Runs) -> None:
    """A model loaded for inference has plain embeddings and gives the same logits as the trained model."""
    whole = replace(STABLE, updates=4, save_every=4, evaluate=True)
    tied = shapes(runs, replace(whole, tied=True)) if runs.has("tied") else []
    for recipe in (*shapes(runs, whole), *tied):
        run = runs.trace(recipe)
        evaluated = [f for f in run.forwards if f.update == 4 and not f.training]
        if not evaluated:
            raise Violation("an evaluation after the last update", "no forward in eval mode")
        module = runs.load(saved(run, 4))
        kinds = [type(child) for child in module.modules() if isinstance(child, nn.Embedding)]
        if any(kind is not nn.Embedding for kind in kinds):
            raise Violation("plain nn.Embedding in the loaded model", ", ".join(kind.__name__ for kind in kinds))
        with torch.no_grad():
            outputs = {f"batch {i}": find_logits(module(f.ids.long())) for i, f in enumerate(evaluated)}
        found = {name: logits.float() for name, logits in outputs.items() if logits is not None}
        expected = {f"batch {i}": f.scores.float() for i, f in enumerate(evaluated)}
        try:
            tensors_equal(expected, found, "logits of the loaded model against those of the trained one")
        except Violation as error:
            unlike = embedding.unlike_trained(module, run.update(-1).after)
            raise Violation(error.expected, "; ".join([*unlike, error.seen])) from None


@clause(
    "EMB-22",
    packages=("bitsandbytes",),
    since="0.2",
    needs=("stable-embedding", "keywords"),
    why="The norm of a StableEmbedding is new to rules that sort tensors by the names or the roles in the model: if "
    "its gain decays, every embedding shrinks.",
    mend="Sort tensors by the type of the module that owns them, after the swap.",
    source="huggingface/transformers#16908 (a norm that the rule for weight decay does not know)",
    bound="as DECAY-4 (healthy: 7.1e-8)",
)
def test_decay_after_the_swap(runs: Runs) -> None:
    """With StableEmbedding and zero gradients, one step multiplies each tensor that the policy declares to decay by
    1 - lr * weight_decay and leaves every other tensor alone, the norm of the embedding included.
    """
    strong = OptimizerChoice.of(ADAMW_8BIT, lr=1e-2, weight_decay=0.1)
    for recipe in shapes(runs, replace(STABLE, updates=1, optimizer=strong, zero_gradients=True)):
        run = runs.trace(recipe)
        require_swap(run)
        check_factors(runs, recipe, run)
