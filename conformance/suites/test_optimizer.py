"""OPT: the optimizer that the user named is built with the keyword arguments that the user gave."""

from dataclasses import replace

from conformance.checks import optimizer
from conformance.checks.comparison import states_equal
from conformance.checks.decay import covered_once
from conformance.checks.schedule import rates_are
from conformance.clause import clause
from conformance.errors import NotApplicable, RunFailed, Violation, describe_error
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.trace import Trace
from conformance.runs import Attempt, Runs
from conformance.suites import (
    ADAMW,
    ADAMW_8BIT,
    GROK,
    PAGED_8BIT,
    RMSPROP,
    SGD,
    asked_for,
    rates,
    saved,
    seen,
)

SENTINELS = {"lr": 0.00123, "betas": (0.83, 0.967), "eps": 3.1e-7, "weight_decay": 0.0617}
"""Values that nobody has as a default."""
ZEROS = {"lr": 0.00123, "betas": (0.0, 0.967), "weight_decay": 0.0}
"""Values that are not left out, although they are false."""


def starts(runs: Runs, class_path: str, **arguments: object) -> Trace:
    """Return the trace of two updates with this optimizer. Raises Violation if they do not happen."""
    usual = runs.attempt(Recipe())
    if usual.error is not None and class_path != ADAMW:  # then it is not this optimizer that keeps it from training
        raise RunFailed(f"the plain recipe does not train either: {describe_error(usual.error)}") from usual.error
    name = class_path.rpartition(".")[2]
    fixed = {
        kind.rpartition(".")[2] for update in usual.trace.updates for step in update.steps for kind in step.optimizer
    }
    if not runs.has("any-optimizer") and name not in fixed:
        raise NotApplicable(f"lacks any-optimizer, and its own optimizer is not {name}: {runs.lacks['any-optimizer']}")
    choice = OptimizerChoice.of(class_path, **{"lr": 1e-3, **arguments})
    tried = runs.attempt(Recipe(optimizer=choice))
    if tried.error is not None:
        raise Violation(f"{name} trains", describe_error(tried.error))
    kinds = [
        {kind.rpartition(".")[2] for step in update.steps for kind in step.optimizer}
        for update in seen(tried.trace).updates
    ]
    if not kinds or any(name not in kind for kind in kinds):  # a stack may derive a class of its own
        found = {step.optimizer[0].rpartition(".")[2] for update in tried.trace.updates for step in update.steps}
        raise Violation(f"the steps are those of {name}", f"those of {', '.join(sorted(found)) or 'no optimizer'}")
    return tried.trace


@clause(
    "OPT-1",
    needs=("any-optimizer",),
    since="0.1",
    why="A user who changes the optimizer gets a crash.",
    mend="Add keywords of your own only where the class accepts them.",
    source="Lightning-AI/litgpt#1743; litgpt's own test says RMSprop each time it means AdamW, SGD and RMSprop",
    bound="two updates",
)
def test_torch_optimizers_start(runs: Runs) -> None:
    """The stack trains with AdamW, SGD and RMSprop of torch.optim."""
    for class_path in (ADAMW, SGD, RMSPROP):
        starts(runs, class_path)


@clause(
    "OPT-2",
    needs=("any-optimizer",),
    packages=("bitsandbytes", "grokadamw"),
    since="0.1",
    why="The optimizers that do not know `fused` are the ones that crash when the stack adds it.",
    mend="Drop `fused` for classes that do not name it.",
    source="Lightning-AI/litgpt#1743, meta-pytorch/torchtune#2152",
    bound="two updates",
)
def test_foreign_optimizers_start(runs: Runs) -> None:
    """The stack trains with GrokAdamW, AdamW8bit and PagedAdamW8bit."""
    for class_path in (GROK, ADAMW_8BIT, PAGED_8BIT):
        starts(runs, class_path)


@clause(
    "OPT-3",
    needs=("any-optimizer",),
    since="0.1",
    why="Research optimizers rarely know `fused`, and crash when the stack adds it.",
    mend="Look at the signature of the class before adding a keyword.",
    source="Lightning-AI/litgpt#1743",
    bound="two updates",
)
def test_class_without_fused(runs: Runs) -> None:
    """The stack trains with an optimizer class that does not accept `fused`."""
    starts(runs, "conformance.probes.WithoutFused", weight_decay=0.1)


@clause(
    "OPT-4",
    needs=("any-optimizer", "builds-optimizer"),
    since="0.1",
    why="A filter by signature that overlooks **kwargs takes everything away, the learning rate included.",
    mend="Pass the user's keywords on without looking at the signature, or honour VAR_KEYWORD.",
    source="litgpt utils.instantiate_torch_optimizer (string form): a class with **kwargs receives {}",
    bound="equality",
)
def test_class_with_any_keywords(runs: Runs) -> None:
    """An optimizer class that accepts **kwargs receives every keyword that the user gave."""
    run = starts(runs, "conformance.probes.AnyKeywords", lr=0.00123, sharpness=7)
    recipe = Recipe(optimizer=OptimizerChoice.of("conformance.probes.AnyKeywords", lr=0.00123, sharpness=7))
    rates_are(asked_for(recipe, run), rates(runs, recipe, run))
    optimizer.keywords_arrive(run.update(0).groups, {"sharpness": 7})


@clause(
    "OPT-5",
    needs=("any-optimizer", "builds-optimizer"),
    since="0.1",
    why="Optimizers with settings of their own cannot be used.",
    mend="Pass on what the user wrote; keep no list of known keywords.",
    source="signature of schedule-free and of second-order optimizers",
    bound="equality",
)
def test_class_with_own_argument(runs: Runs) -> None:
    """An optimizer class that requires an argument of its own, and knows no weight_decay, receives that argument from
    the user, and every trainable tensor.
    """
    run = starts(runs, "conformance.probes.NeedsHorizon", horizon=42)
    optimizer.keywords_arrive(run.update(0).groups, {"horizon": 42})
    if runs.asks("0.2"):  # a stack may gather the tensors in another way where there are no groups by decay
        covered_once([group.tensors for group in run.update(0).groups], run.trainable)


@clause(
    "OPT-6",
    since="0.1",
    needs=("any-optimizer", "fused"),
    level="should",
    why="The for-loop and foreach implementations launch more kernels and take several times as long per step on a "
    "GPU.",
    mend="Set fused=True if the signature of the class names it and the device has the kernel.",
    source="pytorch.org/docs/stable/optim.html",
    bound="fused is True in every group",
)
def test_fused_where_possible(runs: Runs) -> None:
    """The stack switches `fused` on wherever the optimizer class and the device support it."""
    for class_path in (ADAMW, SGD):
        found = [group.settings.get("fused") for group in starts(runs, class_path).update(0).groups]
        if found != [True] * len(found):
            raise Violation(f"fused=True in every group of {class_path}", f"fused is {found}")


@clause(
    "OPT-7",
    needs=("keywords",),
    since="0.1",
    why="The run trains with settings other than those in its configuration.",
    mend="Follow the keyword named here from the configuration to the constructor.",
    source="EleutherAI/gpt-neox#228 (betas), NVIDIA-NeMo/Speech#775 (eps), pykale/pykale#587; "
    "unslothai/unsloth-zoo#818 (a zero is taken for a missing setting)",
    bound="equality of floats; for lr, equality with the rate of the stack's own schedule",
)
def test_keywords_arrive(runs: Runs) -> None:
    """The optimizer receives lr, betas, eps and weight_decay exactly as the user gave them, even if they are zero."""
    for given in [SENTINELS, ZEROS] if runs.asks("0.2") else [SENTINELS]:
        run = starts(runs, ADAMW, **given)
        recipe = Recipe(optimizer=OptimizerChoice.of(ADAMW, **given))
        rates_are(asked_for(recipe, run), rates(runs, recipe, run))
        expected = {name: value for name, value in given.items() if name != "lr"}
        varying = ("weight_decay",) if given["weight_decay"] else ()  # 0 is that of tensors which do not decay, too
        for update in run.updates:
            optimizer.keywords_arrive(update.groups, expected, varying)


@clause(
    "OPT-8",
    needs=("keywords", "builds-optimizer"),
    since="0.1",
    why="A user who switches `fused` off, to compare or to avoid a bug in it, still runs with it.",
    mend="Merge the user's keywords over the added ones, not under them.",
    source="litgpt utils.instantiate_torch_optimizer: init_args.update(kwargs)",
    bound="equality",
)
def test_user_wins(runs: Runs) -> None:
    """If the user gives a keyword that the stack would add by itself, the user's value wins."""
    for value in (False, True):
        run = starts(runs, ADAMW, fused=value)
        optimizer.keywords_arrive(run.update(0).groups, {"fused": value})


@clause(
    "OPT-9",
    needs=("keywords", "builds-optimizer"),
    since="0.1",
    why="The configuration that is saved or logged afterwards is not the one the user wrote.",
    mend="Copy the dictionary before you add to it.",
    source="litgpt utils.instantiate_torch_optimizer changes init_args in place",
    bound="equality",
)
def test_config_untouched(runs: Runs) -> None:
    """The stack does not change the user's configuration."""
    optimizer.config_untouched(starts(runs, ADAMW, weight_decay=0.0617).changed_configs)


def misspelt(runs: Runs) -> Attempt:
    """Return a run whose user wrote wieght_decay, of a stack that trains without the mistake."""
    runs.trace(Recipe())  # a stack that always raises would refuse this too
    return runs.attempt(Recipe(optimizer=OptimizerChoice.of(ADAMW, lr=1e-3, wieght_decay=0.5)))


@clause(
    "OPT-10",
    needs=("keywords", "builds-optimizer"),
    since="0.1",
    why="The run trains with the default value, and nobody notices.",
    mend="Filter only the keywords that you add; pass the user's on to the class, or check them.",
    source="pykale/pykale#587, OpenTabular/DeepTab#415, unslothai/unsloth#10452",
    bound="an error",
)
def test_misspelt_keyword(runs: Runs) -> None:
    """A keyword that the optimizer class does not accept is an error."""
    tried = misspelt(runs)
    if tried.error is None:
        groups = tried.trace.update(0).groups
        found = {group.settings.get("weight_decay") for group in groups}
        raise Violation(
            "an error about the misspelt keyword wieght_decay=0.5",
            f"the run trained with weight_decay {sorted(map(str, found))}",
        )


@clause(
    "OPT-11",
    needs=("keywords", "builds-optimizer"),
    since="0.1",
    level="should",
    why="A list of twenty accepted keywords does not show which letter is wrong.",
    mend="Suggest the nearest accepted keyword (difflib.get_close_matches).",
    source="Python 3.13 itself does this for functions",
    bound="weight_decay is the first accepted keyword in the message",
)
def test_misspelt_keyword_hint(runs: Runs) -> None:
    """The error about a misspelt keyword suggests the nearest keyword that the class accepts."""
    tried = misspelt(runs)
    if tried.error is None:
        raise NotApplicable("the misspelt keyword does not raise an error: see OPT-10")
    accepted = ("lr", "betas", "eps", "weight_decay", "amsgrad", "foreach", "fused")
    # A command line prints what is wrong, as --weight-decay, and quits.
    told = tried.trace.messages if isinstance(tried.error, SystemExit) else [str(tried.error)]
    optimizer.names_nearest(" ".join(told).replace("-", "_"), "weight_decay", accepted)


def survives(runs: Runs, choice: OptimizerChoice) -> None:
    """Check that the optimizer state at the first update of a resumed run is the one that was saved."""
    recipe = Recipe(updates=4, save_every=2, optimizer=choice)
    whole = runs.trace(recipe)
    resumed = runs.trace(replace(recipe, resume=saved(whole, 2)))
    name = choice.class_path.rpartition(".")[2]
    states_equal(whole.update(1).state_after, resumed.update(0).state_before, f"state of {name} after the resume")


@clause(
    "OPT-12",
    packages=("bitsandbytes",),
    since="0.1",
    needs=("any-optimizer", "resume"),
    why="The moments start again at zero: the loss goes on smoothly, but the weights do not.",
    mend="Save optimizer.state_dict(), and load it after the optimizer is built over the same groups.",
    source="EvolvingLMMs-Lab/OneVision-Encoder#65, DeepSpeed#7786; the first loss after a resume shows nothing",
)
def test_state_survives(runs: Runs) -> None:
    """The state of AdamW and AdamW8bit is the same before saving and after resuming, bit for bit."""
    choices = [OptimizerChoice.of(class_path, lr=1e-3) for class_path in (ADAMW, ADAMW_8BIT)]
    training = [choice for choice in choices if runs.attempt(Recipe(optimizer=choice)).error is None]
    if not training:
        raise NotApplicable("neither AdamW nor AdamW8bit trains: see OPT-1 and OPT-2")
    for choice in training:
        survives(runs, choice)


@clause(
    "OPT-13",
    packages=("grokadamw",),
    since="0.1",
    needs=("any-optimizer", "resume"),
    why="grokadamw 0.1.2 keeps its moments in param_groups, keyed by tensor; after a load they silently start at zero.",
    mend="Save such state by position and put it back, or refuse to resume with this optimizer.",
    source="grokadamw 0.1.2: state_dict()['state'] is empty",
    bound="bit equality; or an error, or a message about the lost state",
)
def test_misplaced_state_survives(runs: Runs) -> None:
    """The state of GrokAdamW survives a resume, although its package keeps it in the wrong place, or the stack says
    that it is lost.
    """
    choice = OptimizerChoice.of(GROK, lr=1e-3)
    recipe = Recipe(updates=4, save_every=2, optimizer=choice)
    first = runs.attempt(recipe)
    if first.error is not None and not first.trace.updates:
        raise NotApplicable("GrokAdamW does not train: see OPT-2")
    if first.error is not None and "GrokAdamW" in str(first.error):
        return  # refused when saving, by name
    second = runs.attempt(replace(recipe, resume=saved(runs.trace(recipe), 2)))
    said = [str(second.error)] if second.error else second.trace.messages
    if any("GrokAdamW" in line and "state" in line and ("lost" in line or "cannot" in line) for line in said):
        return
    if second.error is not None:
        raise Violation(
            "a resumed run with GrokAdamW, or an error that names GrokAdamW and says that its state is lost",
            describe_error(second.error),
        )
    survives(runs, choice)
