"""INIT: weights are initialised as declared, on every way to a model, and never over a checkpoint."""

from dataclasses import replace

import torch

from conformance.checks import initialization
from conformance.checks.comparison import tensors_equal
from conformance.checks.data import mean_entropy, next_tokens, sample_numbers
from conformance.clause import clause
from conformance.errors import AdapterFailed, NotApplicable, Violation, quoted
from conformance.probes import OWN_START
from conformance.recipe import Recipe
from conformance.runs import Runs
from conformance.suites import everyday, mean_of, on_two_ranks, saved, shapes, stays_inside


@clause(
    "INIT-1",
    since="0.1",
    why="The run starts from whatever was in memory. It may still learn, but more slowly, and differently each time.",
    mend="Initialise the weights on every path that starts fresh, after the model was built with empty weights.",
    source="Lightning-AI/litgpt#1150, litgpt#689",
    bound="no NaN: uninitialised memory is filled with NaN while the run is recorded",
)
def test_nothing_is_uninitialised(runs: Runs) -> None:
    """On a fresh start the stack leaves no parameter and no buffer uninitialised."""
    for recipe in shapes(runs):
        run = runs.start(recipe)
        initialization.initialised(run.initial, run.buffers)


@clause(
    "INIT-2",
    since="0.1",
    why="If weights start too large or too small, or the residual stream grows with depth, the run trains worse for "
    "weeks.",
    mend="Compare the declared distributions with what the code applies to the tensors named here.",
    source="huggingface/transformers#47458, stanford-crfm/mistral#30; litgpt initialize_weights (GptNeoxMLP)",
    bound="3 standard errors; a tensor beyond them is pooled with the draws of three more seeds and must be within "
    "3 again (healthy: 0.3 % each time). The weakest mutant, scaling for a fixed depth, is off by a factor of 1.4: "
    "36 standard errors at 4096 elements",
)
def test_declared_distribution(runs: Runs) -> None:
    """Every parameter starts from the distribution that the stack declares, including any scaling by depth."""
    starts_as_declared(runs, shapes(runs, Recipe(n_layer=4, updates=1)))


def starts_as_declared(runs: Runs, recipes: list[Recipe]) -> None:
    """Check the initial weights of runs against the declared distributions."""
    wrong: dict[str, str] = {}
    for recipe in recipes:
        run = runs.start(recipe)
        declared = {name: runs.policy.initial(recipe, info) for name, info in run.tensors.items()}
        suspects = [name for name in declared if initialization.deviation(run.initial[name], declared[name])]
        if suspects:  # one in a hundred is beyond 3 standard errors by chance: draw those again
            more = [runs.start(replace(recipe, seed=seed)).initial for seed in (2, 3, 4)]
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
    since="0.1",
    why="A result that cannot be repeated cannot be debugged.",
    mend="Seed before the model is built, and draw from nothing that depends on time, process or hash order.",
    source="huggingface/transformers#46620 shows how such faults hide",
)
def test_same_seed_same_start(runs: Runs) -> None:
    """Two runs with the same seed start from the same weights, bit for bit."""
    for recipe in shapes(runs):
        first, second = runs.start(recipe), runs.start(replace(recipe, repeat=1))
        tensors_equal(first.initial, second.initial, "parameters of two runs with the same seed")


@clause(
    "INIT-4",
    needs=("seed",),
    since="0.1",
    why="Runs with different seeds are then the same run, and the spread of their results says nothing.",
    mend="Pass the configured seed to the generator that draws the weights.",
    source="Lightning-AI/litgpt#1425 (a seed that was not passed on)",
)
def test_other_seed_other_start(runs: Runs) -> None:
    """Two runs with different seeds start from different weights, in every tensor that is drawn at random."""
    for recipe in shapes(runs):
        initialization.starts_differ(runs.start(recipe).initial, runs.start(replace(recipe, seed=2)).initial)


@clause(
    "INIT-5",
    since="0.1",
    why="A first loss above ln V means that the logits are too large: the first hundred updates only shrink them.",
    mend="Look at the scale of the head (INIT-2 names it), and of the last norm.",
    source="A. Karpathy, A Recipe for Training Neural Networks (2019): verify the loss at init",
    bound="0.8 nats above, 0.5 below; healthy: 0.02 (reference) to 0.51 (torchtitan by design, logits of variance 1; "
    "from seed to seed 0.03); weakest mutant: 8.8",
)
def test_first_loss(runs: Runs) -> None:
    """The first loss is close to ln V, the loss of a uniform guess over V tokens."""
    for recipe in shapes(runs):
        rows = torch.cat(recipe.batches())
        # Of the logits: the loss on which backward is called may be a sum, divided later. Its scale is ACC-5's matter.
        run = runs.trace(recipe)
        entropies = [entropy for entropy in run.entropies if entropy.grad_enabled]
        if stays_inside(run.training_forwards(), entropies):
            initialization.starts_ignorant(mean_of(entropies[:1]), recipe.vocab_size)
            continue
        first = next(iter(run.training_forwards()), None)
        numbers = [] if first is None else [n for n in sample_numbers(first.ids, rows) if n is not None]
        if first is None or len(numbers) != len(first.ids):
            raise NotApplicable("the first forward is not on the sequences that the recipe gives: see ACC-6")
        initialization.starts_ignorant(mean_entropy(*next_tokens(first.scores, rows[numbers])), recipe.vocab_size)


@clause(
    "INIT-6",
    since="0.1",
    needs=("resume",),
    why="Training goes on from weights that nobody saved.",
    mend="Initialise only on a fresh start, or before loading, and load every parameter and buffer.",
    source="huggingface/transformers#46620, #45591",
)
def test_resume_restores(runs: Runs) -> None:
    """A resumed run starts from the saved parameters, bit for bit, and initialises nothing again."""
    recipe = Recipe(updates=4, save_every=2)
    whole = runs.trace(recipe)
    resumed = runs.start(replace(recipe, resume=saved(whole, 2)))
    tensors_equal(whole.update(1).after, resumed.initial, "parameters at the start of the resumed run")
    tensors_equal(whole.buffers, resumed.buffers, "buffers at the start of the resumed run")


@clause(
    "INIT-7",
    since="0.1",
    needs=("resume",),
    why="The run silently starts over from random weights, and looks like a resumed one.",
    mend="Raise an error if the checkpoint that the user named does not exist.",
    source="pytorch/torchtitan#1311",
    bound="an error",
)
def test_missing_checkpoint(runs: Runs) -> None:
    """Resuming from a checkpoint that does not exist is an error."""
    runs.trace(Recipe())  # a stack that always raises would raise here too
    try:
        tried = runs.attempt(Recipe(resume=Recipe().missing_checkpoint()))
    except AdapterFailed as error:
        if isinstance(error.__cause__, FileNotFoundError):  # it copies the file to where its stack looks for it, say
            raise NotApplicable("the adapter itself reads the checkpoint, so the stack is never asked for it") from None
        raise
    if tried.error is None:
        raise Violation("an error", f"the run trained {len(tried.trace.updates)} updates from fresh weights")


@clause(
    "INIT-8",
    since="0.1",
    needs=("meta-init",),
    why="Rotary tables and masks built on the meta device hold garbage, and attention computes noise.",
    mend="Recompute the buffers when the model is materialised; to_empty() does not do this.",
    source="pytorch/torchtitan freqs_cis handling; transformers#25681",
)
def test_buffers_after_meta(runs: Runs) -> None:
    """A model built on the meta device has the same buffers as one built eagerly."""
    for recipe in shapes(runs):
        eager, meta = runs.start(recipe), runs.start(replace(recipe, initialization="meta"))
        tensors_equal(eager.buffers, meta.buffers, "buffers built eagerly against buffers built on the meta device")


@clause(
    "INIT-9",
    since="0.1",
    needs=("meta-init",),
    why="A sharded model starts from weights other than those of the same model on one device, or with its tie broken.",
    mend="Draw each tensor from the seed and its name, tie again after to_empty(), and initialise what to_empty() "
    "left empty.",
    source="litgpt#1150, facebookresearch/lingua#75, verl#7834",
)
def test_parameters_after_meta(runs: Runs) -> None:
    """A model built on the meta device and materialised afterwards has the same parameters as one built eagerly, bit
    for bit.
    """
    variants = shapes(runs)
    if runs.has("tied"):
        variants += shapes(runs, Recipe(tied=True))
    for recipe in variants:
        eager, meta = runs.start(recipe), runs.start(replace(recipe, initialization="meta"))
        tensors_equal(
            eager.initial, meta.initial, "parameters built eagerly against parameters built on the meta device"
        )


@clause(
    "INIT-10",
    since="0.1",
    needs=("meta-init", "foreign-module"),
    why="The parameter keeps whatever to_empty() found in memory.",
    mend="Before materialising, look for modules that own tensors and have no reset_parameters, and name them.",
    source="pytorch FSDP param_init_fn; litgpt f3ef7c4d (adapter tensors left empty)",
    bound="an error that contains the name",
)
def test_lost_on_meta(runs: Runs) -> None:
    """If a module has parameters and no way to initialise them after it was built on the meta device, the stack raises
    an error that names the module.
    """
    tried = runs.attempt(Recipe(module="conformance.probes:LostOnMeta", initialization="meta"))
    if tried.error is None:
        raise Violation("an error that names LostOnMeta, a module with no way to initialise it", "the run trained")
    if "LostOnMeta" not in str(tried.error):
        raise Violation("an error that names LostOnMeta", f"{type(tried.error).__name__}: {tried.error}")


@clause(
    "INIT-11",
    since="0.1",
    needs=("two-ranks",),
    why="The ranks train different models with each other's gradients; the loss still falls.",
    mend="Seed every rank alike before the model is built, or broadcast rank 0's parameters.",
    source="litgpt#269, pytorch/torchtitan#166, mosaicml/llm-foundry#830, mlfoundations/open_lm#139",
)
def test_ranks_start_equal(runs: Runs) -> None:
    """Two ranks start from the same parameters."""
    first, second = runs.ranks(on_two_ranks(everyday(runs)))
    tensors_equal(first.initial, second.initial, "parameters of rank 0 against rank 1")


@clause(
    "INIT-12",
    since="0.2",
    needs=("tied",),
    why="A tied tensor may be initialised twice, once under each name: the last draw wins, often with the head's "
    "larger scale.",
    mend="Tie before initialising, and skip a tensor that has already been drawn.",
    source="huggingface/transformers#46620 (init over tensors that have their values), facebookresearch/lingua#75",
    bound="as INIT-2",
)
def test_declared_distribution_tied(runs: Runs) -> None:
    """If embedding and head are tied, every parameter still starts from the distribution that the stack declares."""
    starts_as_declared(runs, shapes(runs, Recipe(n_layer=4, updates=1, tied=True)))


@clause(
    "INIT-13",
    since="0.2",
    needs=("foreign-module",),
    why="The stack silently overwrites a module that was built with weights of its own, pretrained or designed.",
    mend="Initialise only your own model; keep what another library's constructor has set.",
    source="huggingface/transformers#46620 (init over loaded tensors), litgpt initialize_weights (every nn.Linear)",
)
def test_foreign_module_keeps_its_start(runs: Runs) -> None:
    """The stack leaves a module from another library with the initial values that the module's own constructor set."""
    run = runs.start(Recipe(module="conformance.probes:OwnStart"))
    wrong = []
    for ending, value in OWN_START.items():
        name = next((name for name in run.initial if name.endswith(ending)), None)
        if name is None:
            raise Violation(f"the module has a tensor {ending}", f"only {quoted(run.initial)}")
        if not bool((run.initial[name] == value).all()):
            wrong.append(f"{name} is {run.initial[name].double().mean().item():.4g} in the mean, not {value:g}")
    if wrong:
        raise Violation("a module of somebody else's starts from its own values", quoted(wrong))


@clause(
    "INIT-14",
    since="0.2",
    why="Layers that start equal stay alike for long, so the model has fewer different layers than it seems; each "
    "tensor by itself looks as declared.",
    mend="Draw all tensors from one generator, or seed each by its name; do not set the same seed before each layer.",
    source="netket/netket#241 (the same seed for all layers)",
)
def test_no_two_tensors_start_alike(runs: Runs) -> None:
    """No two tensors that are drawn at random start with the same values."""
    for recipe in shapes(runs, Recipe(n_layer=4, updates=1)):
        initialization.starts_apart(runs.start(recipe).initial)


@clause(
    "INIT-15",
    since="0.2",
    needs=("initial-std",),
    why="A part that ignores the configured standard deviation starts with the scale of another model.",
    mend="Pass the configured value on to every tensor that is drawn, tables included. If your stack has no such "
    "setting, name initial-std in lacks.",
    source="huggingface/transformers#39772 (0.02 written into the initialisation of embeddings)",
    bound="as INIT-2",
)
def test_configured_deviation(runs: Runs) -> None:
    """If the user sets the standard deviation of initial weights, every parameter starts from the distribution that the
    stack declares for it.
    """
    for recipe in shapes(runs, Recipe(n_layer=4, updates=1, initial_std=0.05)):
        tensors, plain = runs.start(recipe).tensors.values(), replace(recipe, initial_std=None)
        if all(runs.policy.initial(recipe, info) == runs.policy.initial(plain, info) for info in tensors):
            raise NotApplicable("the policy declares the same initial weights whatever recipe.initial_std is")
        starts_as_declared(runs, [recipe])


@clause(
    "INIT-16",
    since="0.2",
    needs=("foreign-module", "module-factory"),
    why="The run starts from whatever random numbers were used up before it, so no seed repeats it.",
    mend="Set the seed before you call the function that builds the module. If your stack is handed a module that its "
    "user has built, name module-factory in lacks.",
    source="ThilinaRajapakse/simpletransformers#1478 (the seed does not reach what builds the model)",
)
def test_seed_before_the_factory(runs: Runs) -> None:
    """A module that the stack builds by a function of its user starts from the same weights in two runs with the same
    seed, whatever random numbers were drawn before.
    """
    recipe = Recipe(module="conformance.probes:MemoryTransformer")
    first = runs.start(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.rand(1)  # now the generator has another state than at the beginning of the first run
        second = runs.start(replace(recipe, repeat=1))
    tensors_equal(first.initial, second.initial, "parameters of two runs of a user's module with the same seed")
