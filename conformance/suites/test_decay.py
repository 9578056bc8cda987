"""DECAY: every trainable tensor is optimised, once, and decays exactly where the stack says so."""

from dataclasses import replace

from conformance.checks import decay
from conformance.clause import clause
from conformance.errors import NotApplicable, Violation, quoted
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.trace import Trace
from conformance.runs import Runs
from conformance.suites import ADAMW, asked_for, seen, shapes

MEMORY = "conformance.probes:MemoryTransformer"
STRONG = OptimizerChoice.of(ADAMW, lr=1e-2, weight_decay=0.1)
NONE = OptimizerChoice.of(ADAMW, lr=1e-2, weight_decay=0.0)


def variants(runs: Runs, recipe: Recipe | None = None) -> list[Recipe]:
    """Return both shapes, untied and, where the subject can, tied; and the module with memory tokens."""
    recipe = recipe or Recipe()
    recipes = shapes(runs, recipe)
    if runs.has("tied"):
        recipes += shapes(runs, replace(recipe, tied=True))
    if runs.has("foreign-module"):
        recipes.append(replace(recipe, module=MEMORY))
    return recipes


@clause(
    "DECAY-1",
    since="0.1",
    why="A tensor in no group is never trained; one that is listed twice is updated twice.",
    mend="Build the groups from named_parameters() of the final model, by identity, after every swap and tie.",
    source="huggingface/accelerate#3256, pytorch#149205, nanoGPT 7c828855 (tied head)",
    bound="exactly once",
)
def test_each_tensor_once(runs: Runs) -> None:
    """Every trainable tensor is in exactly one parameter group, exactly once; a tied tensor counts as one."""
    for recipe in variants(runs):
        run = seen(runs.trace(recipe))
        owners = {name: runs.policy.owner(recipe, run.tensors[name]) for name in run.trainable}
        for update in run.updates:
            decay.covered_once([group.tensors for group in update.groups], run.trainable)
            decay.owned_as_declared(update.steps, owners)


@clause(
    "DECAY-2",
    since="0.1",
    why="If the optimizer holds tensors that the model does not use, it usually lacks the tensors that the model "
    "does use.",
    mend="Build the optimizer after the last change of the model, over tensors with requires_grad.",
    source="litgpt finetune/lora.py StableEmbedding swap: one orphan in the optimizer",
    bound="none",
)
def test_no_strangers(runs: Runs) -> None:
    """The optimizer holds no frozen tensor and no tensor that the model does not use."""
    for recipe in variants(runs):
        run = seen(runs.trace(recipe))
        for update in run.updates:
            decay.only_these([group.tensors for group in update.groups], run.trainable)


@clause(
    "DECAY-3",
    since="0.1",
    needs=("foreign-module",),
    why="What the user froze drifts: weight decay moves it even without a gradient.",
    mend="Leave tensors with requires_grad=False out of every group, and never set the flag yourself.",
    source="litgpt finetune/lora.py (flags not preserved by the swap)",
)
def test_frozen_stay(runs: Runs) -> None:
    """A frozen tensor stays frozen and keeps its value, bit for bit."""
    run = runs.trace(Recipe(module=MEMORY, optimizer=STRONG))
    frozen = [name for name in run.tensors if name.endswith("frozen.weight")]  # a stack may wrap the module
    if not frozen:
        raise Violation("the module has a tensor frozen.weight", f"only {quoted(run.tensors)}")
    if run.tensors[frozen[0]].trainable:
        raise Violation(f"{frozen[0]} keeps requires_grad=False", "it requires gradients")
    decay.unmoved(run.initial, run.update(-1).after, frozen)


@clause(
    "DECAY-4",
    needs=("keywords",),
    since="0.1",
    why="Gains and biases are pulled to zero, or matrices are not regularised: the model is not the one that was "
    "designed.",
    mend="Sort tensors by role and identity; a list of names misses the next library's norm.",
    source="Lightning-AI/lit-llama#254, transformers#16908, #35927, ServiceNow/Fast-LLM#545, joennlae/tensorli#1",
    bound="2.5e-7 relative for decayed tensors (healthy: 7.2e-8; weakest mutant: 1e-3), bit equality for the others",
)
def test_decay_as_declared(runs: Runs) -> None:
    """With zero gradients, one step multiplies each decayed tensor by 1 - lr * weight_decay and leaves every other
    tensor alone.
    """
    recipes = shapes(runs, Recipe(optimizer=STRONG, zero_gradients=True))
    if runs.has("tied"):
        recipes.append(replace(recipes[0], tied=True))
    for recipe in recipes:
        check_factors(runs, recipe, runs.trace(recipe))


def check_factors(runs: Runs, recipe: Recipe, run: Trace, number: int = 0) -> None:
    """Check that a step of a run without gradients acts as the subject's policy says: the first, or number n from 0."""
    update = run.update(number)
    rates = {name: runs.policy.rate(recipe, number, run.tensors[name]) for name in run.trainable}
    strength = dict(recipe.optimizer.arguments)["weight_decay"]
    decays = {name: runs.policy.decays(recipe, run.tensors[name]) for name in run.trainable}
    factors = {name: 1.0 - rates[name] * strength if decays[name] else 1.0 for name in run.trainable}
    decay.decay_acts(update.before, update.after, factors)
    # A tensor of zeros (a fresh bias, a gain stored as its offset from 1) shows nothing: there its group must do.
    acting = {name: group.settings.get("weight_decay", 0.0) != 0 for group in update.groups for name in group.tensors}
    wrong = [n for n in factors if not update.before[n].any() and acting.get(n, False) != decays[n]]
    if wrong:
        raise Violation(
            "tensors of zeros are in groups that decay as the policy declares", f"these are not: {quoted(wrong)}"
        )


@clause(
    "DECAY-5",
    since="0.1",
    why="A tensor that requires gradients and never moves is dead weight; usually it is in no group.",
    mend="Check that the tensor named here is in a group, has a gradient and a learning rate above zero.",
    source="huggingface/accelerate#3209, LitGPT's StableEmbedding swap (three tensors never stepped)",
    bound="bit inequality after four updates",
)
def test_every_tensor_moves(runs: Runs) -> None:
    """Every trainable tensor moves when gradients are not zero and weight decay is off."""
    for recipe in variants(runs, Recipe(updates=4, optimizer=NONE)):
        run = runs.trace(recipe)
        decay.moved(run.initial, run.update(-1).after, run.trainable)


@clause(
    "DECAY-6",
    since="0.1",
    needs=("keywords", "foreign-module"),
    why="A rule by ndim mistakes memory tokens, memory keys and values, and norm gains called g for matrices.",
    mend="Recognise norms by the type of the module that owns the tensor, and memory tensors by name.",
    source="lucidrains/x-transformers#230, deepspeedai/DeepSpeedExamples#755",
    bound="as DECAY-4",
)
def test_foreign_module_decays_as_declared(runs: Runs) -> None:
    """In a module from another library, norm gains, biases, embeddings, memory tokens and mem_k/mem_v decay as
    declared.
    """
    recipe = Recipe(module=MEMORY, optimizer=STRONG, zero_gradients=True)
    check_factors(runs, recipe, runs.trace(recipe))


@clause(
    "DECAY-7",
    since="0.1",
    needs=("keywords", "ndim-policy"),
    level="should",
    why="A comparison with nanoGPT needs its decay rule.",
    mend="Offer a rule by the number of dimensions (ndim) in addition to the one by role.",
    source="karpathy/nanoGPT configure_optimizers",
    bound="as DECAY-4",
)
def test_ndim_policy(runs: Runs) -> None:
    """Under the ndim policy, the stack decays tensors of two or more dimensions and no others."""
    for recipe in shapes(runs, Recipe(optimizer=STRONG, zero_gradients=True, decay="ndim")):
        run = runs.trace(recipe)
        rates = {name: runs.policy.rate(recipe, 0, run.tensors[name]) for name in run.trainable}
        factors = {name: 1.0 - rates[name] * 0.1 if len(run.tensors[name].shape) >= 2 else 1.0 for name in rates}
        decay.decay_acts(run.update(0).before, run.update(0).after, factors)


@clause(
    "DECAY-8",
    since="0.1",
    needs=("compile",),
    why="Rules by name break when compile or a wrapper puts a prefix before every name.",
    mend="Build the groups from the bare module, or strip the prefixes `_orig_mod.` and `module.` from names.",
    source="pytorch#101107, rasbt/LLMs-from-scratch#580",
    bound="the same tensors in the same groups",
)
def test_groups_independent_of_wrappers(runs: Runs) -> None:
    """Compiling the model, or wrapping it for several ranks, does not change its parameter groups."""
    for recipe in shapes(runs, Recipe(optimizer=STRONG)):
        plain = decays_by_name(runs.trace(recipe))
        others = {"compiled": decays_by_name(runs.trace(replace(recipe, compile=True)))}
        if runs.has("two-ranks") and recipe.shape == "gpt":
            others["on two ranks"] = decays_by_name(runs.ranks(replace(recipe, world_size=2))[0])
        for what, groups in others.items():
            moved = [name for name in plain | groups if plain.get(name) != groups.get(name)]
            if moved:
                raise Violation(f"the same groups {what}", f"other weight decay for {quoted(moved)}")


def decays_by_name(run: Trace) -> dict[str, object]:
    """Return the weight decay of each tensor."""
    return {name: group.settings.get("weight_decay") for group in run.update(0).groups for name in group.tensors}


@clause(
    "DECAY-9",
    since="0.2",
    needs=("keywords", "schedule"),
    why="If the decay itself follows the schedule, it is multiplied by the rate twice, and hardly acts in most of the "
    "run; the closed form of each step shows nothing, because it takes the setting as it finds it.",
    mend="Leave weight_decay as the user gave it: the optimizer multiplies it by the rate of the update.",
    source="NVIDIA-NeMo/Automodel#3883, NVIDIA/Megatron-LM#7468 (a decay other than the one that was asked for)",
    bound="as DECAY-4, in each of four updates",
)
def test_decay_under_a_schedule(runs: Runs) -> None:
    """Under a schedule, with zero gradients, every step multiplies each decayed tensor by 1 - lr * weight_decay, with
    the rate of that update and the weight decay that the user gave, and leaves every other tensor alone.
    """
    recipe = Recipe(optimizer=STRONG, zero_gradients=True, updates=4, warmup=1, minimum_lr=2e-3)
    for scheduled in shapes(runs, recipe):
        run = runs.trace(scheduled)
        for number in range(len(asked_for(scheduled, run))):
            check_factors(runs, scheduled, run, number)


@clause(
    "DECAY-10",
    since="0.2",
    needs=("keywords", "decay-all"),
    why="An option that does nothing makes two experiments one.",
    mend="Put every trainable tensor into the group that decays. If your stack has no such option, name decay-all in "
    "lacks.",
    source="unslothai/unsloth#10452 (a documented option does nothing)",
    bound="as DECAY-4",
)
def test_everything_decays(runs: Runs) -> None:
    """If the user asks for the decay of all tensors, the stack decays every trainable tensor."""
    recipe = Recipe(optimizer=STRONG, zero_gradients=True, decay="all")
    run = runs.trace(recipe)
    kept = [name for name in run.trainable if not runs.policy.decays(recipe, run.tensors[name])]
    if kept:
        raise NotApplicable(f"the policy declares that {quoted(kept)} do not decay, although all tensors are to decay")
    factors = {name: 1.0 - runs.policy.rate(recipe, 0, run.tensors[name]) * 0.1 for name in run.trainable}
    decay.decay_acts(run.update(0).before, run.update(0).after, factors)
