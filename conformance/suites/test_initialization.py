"""INIT: weights are initialised as declared, on every way to a model, and never over a checkpoint."""

from dataclasses import replace
from typing import Any

import torch

from conformance.checks import initialization
from conformance.checks.comparison import tensors_equal
from conformance.checks.data import mean_entropy, next_tokens, sample_numbers
from conformance.clause import NotApplicable, Violation, clause
from conformance.recipe import Recipe
from conformance.subject import Subject
from conformance.suites import everyday, on_two_ranks, shapes


@clause(
    "INIT-1",
    why="The run starts from whatever was in memory; it may still learn, slower and differently each time.",
    mend="Call the initialisation after building with empty weights, on every path that starts fresh.",
    source="Lightning-AI/litgpt#1150, litgpt#689",
    bound="no NaN: uninitialised memory is filled with NaN while the run is recorded",
)
def test_nothing_is_uninitialised(subject: Subject, start: Any) -> None:
    """On a fresh start no parameter and no buffer is left uninitialised."""
    for recipe in shapes(subject):
        run = start(recipe)
        initialization.initialised(run.initial, run.buffers)


@clause(
    "INIT-2",
    why="Weights that are too large or too small, or a residual stream that grows with depth, train worse for weeks.",
    mend="Compare the table of initial distributions with what the code applies to the tensors named here.",
    source="huggingface/transformers#47458, stanford-crfm/mistral#30; litgpt initialize_weights (GptNeoxMLP)",
    bound="3 standard errors; a tensor beyond them is pooled with the draws of three more seeds and must be within "
    "3 again (healthy: 0.3 % each time). The weakest mutant, scaling for a fixed depth, is off by a factor of 1.4: "
    "36 standard errors at 4096 elements",
)
def test_declared_distribution(subject: Subject, start: Any) -> None:
    """Every parameter starts from the distribution that the stack declares, residual scaling by depth included."""
    wrong: dict[str, str] = {}
    for recipe in shapes(subject, n_layer=4, updates=1):
        run = start(recipe)
        declared = {name: subject.policy.initial(recipe, info) for name, info in run.tensors.items()}
        suspects = [name for name in declared if initialization.deviation(run.initial[name], declared[name])]
        if suspects:  # one in a hundred is beyond 3 standard errors by chance: draw those again
            more = [start(replace(recipe, seed=seed)).initial for seed in (2, 3, 4)]
            for name in suspects:
                pooled = torch.stack([run.initial[name], *(other[name] for other in more)])
                if text := initialization.deviation(pooled, declared[name]):
                    wrong[f"{name} ({recipe.shape})"] = text
    if wrong:
        listed = "; ".join(f"{name}: {text}" for name, text in list(wrong.items())[:6])
        more_text = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise Violation("mean and std of every parameter as declared, within 3 standard errors", listed + more_text)


@clause(
    "INIT-3",
    why="A result that cannot be repeated cannot be debugged.",
    mend="Seed before the model is built, and draw from nothing that depends on time, process or hash order.",
    source="huggingface/transformers#46620 shows how such faults hide",
)
def test_same_seed_same_start(subject: Subject, start: Any) -> None:
    """The same seed gives the same start, bit for bit."""
    for recipe in shapes(subject):
        first, second = start(recipe), start(replace(recipe, repeat=1))
        tensors_equal(first.initial, second.initial, "the same seed twice")


@clause(
    "INIT-4",
    why="Runs under several seeds are one run, and their spread says nothing.",
    mend="Hand the configured seed to the generator that draws the weights.",
    source="Lightning-AI/litgpt#1425 (a seed that was not passed on)",
)
def test_other_seed_other_start(subject: Subject, start: Any) -> None:
    """Another seed gives another start, in every tensor that is drawn at random."""
    for recipe in shapes(subject):
        initialization.starts_differ(start(recipe).initial, start(replace(recipe, seed=2)).initial)


@clause(
    "INIT-5",
    why="A first loss above ln V means logits that are too large: the first hundred updates only shrink them.",
    mend="Look at the scale of the head (INIT-2 names it), and of the last norm.",
    source="A. Karpathy, A Recipe for Training Neural Networks (2019): verify the loss at init",
    bound="0.5 nats; healthy: 0.02 (reference) to 0.31 (LitGPT by design, logits of variance 0.4); weakest mutant: 8.8",
)
def test_first_loss(subject: Subject, trace: Any) -> None:
    """The first loss is that of a uniform guess, ln V."""
    for recipe in shapes(subject):
        rows = torch.cat(recipe.batches())
        # Of the logits: the loss on which backward is called may be a sum, divided later. Its scale is ACC-5's matter.
        first = next((f for f in trace(recipe).forwards if f.training and f.grad_enabled), None)
        numbers = [] if first is None else [n for n in sample_numbers(first.ids, rows) if n is not None]
        if first is None or len(numbers) != len(first.ids):
            raise NotApplicable("the first forward is not on the sequences given: see ACC-6")
        initialization.starts_ignorant(mean_entropy(*next_tokens(first.logits, rows[numbers])), recipe.vocab_size)


@clause(
    "INIT-6",
    needs=("resume",),
    why="Training goes on from other weights than those that were saved.",
    mend="Initialise only on a fresh start, or before loading, and load every parameter and buffer.",
    source="huggingface/transformers#46620, #45591",
)
def test_resume_restores(trace: Any, start: Any) -> None:
    """A resumed run starts from the parameters that were saved, bit for bit, and initialises nothing again."""
    recipe = Recipe(updates=4, save_every=2)
    whole = trace(recipe)
    saved = whole.checkpoint(2)
    if saved is None:
        raise Violation("a checkpoint after update 2 of 4, with save_every=2", "no file was written there")
    resumed = start(replace(recipe, resume=saved))
    tensors_equal(whole.updates[1].after, resumed.initial, "parameters at the start of the resumed run")
    tensors_equal(whole.buffers, resumed.buffers, "buffers at the start of the resumed run")


@clause(
    "INIT-7",
    needs=("resume",),
    why="The run silently starts over from random weights, and looks like training.",
    mend="Raise if the checkpoint that the user named is not there.",
    source="pytorch/torchtitan#1311",
)
def test_missing_checkpoint(trace: Any, attempt: Any) -> None:
    """Resuming from a checkpoint that is not there is an error."""
    trace(Recipe())  # a stack that always raises would raise here too
    tried = attempt(Recipe(resume=Recipe().missing_checkpoint()))
    if tried.error is None:
        raise Violation("an error", f"the run trained {len(tried.trace.updates)} updates from fresh weights")


@clause(
    "INIT-8",
    needs=("meta-init",),
    why="Rotary tables and masks that are built on the meta device come back as garbage: attention is noise.",
    mend="Recompute buffers when the model is materialised; to_empty() does not.",
    source="pytorch/torchtitan freqs_cis handling; transformers#25681",
)
def test_buffers_after_meta(subject: Subject, start: Any) -> None:
    """Buffers of a model that was built on the meta device equal those of an eager build."""
    for recipe in shapes(subject):
        eager, meta = start(recipe), start(replace(recipe, initialization="meta"))
        tensors_equal(eager.buffers, meta.buffers, "buffers, eager against meta")


@clause(
    "INIT-9",
    needs=("meta-init",),
    why="A model that is sharded starts from other weights, or untied ones, than the same model on one device.",
    mend="Draw each tensor from the seed and its name, tie again after to_empty(), initialise what it left empty.",
    source="litgpt#1150, facebookresearch/lingua#75, verl#7834",
)
def test_parameters_after_meta(subject: Subject, start: Any) -> None:
    """Built on the meta device and materialised afterwards, as FSDP does, the model is bit-equal to the eager one."""
    variants = shapes(subject)
    if "tied" not in subject.lacks:
        variants += shapes(subject, tied=True)
    for recipe in variants:
        eager, meta = start(recipe), start(replace(recipe, initialization="meta"))
        tensors_equal(eager.initial, meta.initial, "parameters, eager against meta")


@clause(
    "INIT-10",
    needs=("meta-init", "foreign-module"),
    why="The parameter keeps whatever to_empty() found in memory.",
    mend="Before materialising, look for modules that own tensors and have no reset_parameters, and name them.",
    source="pytorch FSDP param_init_fn; litgpt f3ef7c4d (adapter tensors left empty)",
    bound="an error that contains the name",
)
def test_lost_on_meta(subject: Subject, attempt: Any) -> None:
    """A module with parameters of its own and no way to initialise them after a meta build is an error naming it."""
    tried = attempt(Recipe(module="conformance.probes:LostOnMeta", initialization="meta"))
    if tried.error is None:
        raise Violation("an error that names LostOnMeta", "the run trained")
    if "LostOnMeta" not in str(tried.error):
        raise Violation("an error that names LostOnMeta", f"{type(tried.error).__name__}: {tried.error}")


@clause(
    "INIT-11",
    needs=("two-ranks",),
    why="The ranks train different models with each other's gradients; the loss still falls.",
    mend="Seed every rank alike before the model is built, or broadcast rank 0's parameters.",
    source="litgpt#269, pytorch/torchtitan#166, mosaicml/llm-foundry#830, mlfoundations/open_lm#139",
)
def test_ranks_start_equal(subject: Subject, ranks: Any) -> None:
    """Two ranks start from equal parameters."""
    first, second = ranks(on_two_ranks(everyday(subject)))
    tensors_equal(first.initial, second.initial, "parameters of rank 0 against rank 1")
