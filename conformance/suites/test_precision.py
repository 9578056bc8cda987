"""PREC: computed in the precision that was asked for, and the loss in float32 whatever that is."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conformance.checks import precision
from conformance.checks.data import mean_entropy
from conformance.checks.loss import nothing_else
from conformance.clause import clause
from conformance.errors import NotApplicable, RunFailed, Violation, quoted
from conformance.recipe import OptimizerChoice, Precision, Recipe
from conformance.recording.trace import Forward, Trace
from conformance.runs import Runs
from conformance.suites import (
    ADAMW,
    DESCENT,
    cross_entropies,
    saved,
    shapes,
    stays_inside,
)

WEIGHTS: dict[Precision, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
}
COMPUTE: dict[Precision, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-true": torch.bfloat16,
}


@clause(
    "PREC-1",
    needs=("float32-logits",),
    since="0.1",
    why="Softmax, sampling and losses computed from 16-bit logits lose two of three decimal digits.",
    mend="Convert the logits on leaving the model, as Fabric's wrapper does.",
    source="Lightning-AI/litgpt#1508, Fabric's Precision.convert_output",
    bound="dtype",
)
def test_logits_float32(runs: Runs) -> None:
    """Logits leave the model in float32, in every precision that the stack offers."""
    for name in runs.precisions():
        run = runs.trace(Recipe(precision=name, evaluate=runs.has("evaluate")))
        found = {f"logits of forward {i} under {name}": f.scores.dtype for i, f in leaving(run)}
        precision.dtypes_are(found, torch.float32, "logits")


def leaving(run: Trace) -> list[tuple[int, Forward]]:
    """Return the forwards whose logits leave the outermost module, numbered.

    Raises:
        NotApplicable: if there are none.
    """
    found = [(number, forward) for number, forward in enumerate(run.forwards) if not forward.inside]
    if not found:
        raise NotApplicable("the model computes its loss inside: no logits leave it")
    return found


@clause(
    "PREC-2",
    since="0.1",
    needs=("logits-opt-out",),
    level="should",
    why="Float32 logits of a large vocabulary are the largest tensor of the step: 3.3 GB at 16 x 1024 x 50304.",
    mend="Offer a switch that leaves the logits as they were computed, and convert inside the loss.",
    source="Lightning-AI/litgpt#1508, pytorch#124480",
    bound="dtype",
)
def test_logits_opt_out(runs: Runs) -> None:
    """If the user opts out of float32 logits, they leave the model in the dtype they were computed in."""
    for name in runs.precisions():
        run = runs.trace(Recipe(precision=name, logits="compute"))
        found = {f"logits of forward {i} under {name}": f.scores.dtype for i, f in leaving(run)}
        precision.dtypes_are(found, COMPUTE[name], "logits")


@clause(
    "PREC-3",
    since="0.1",
    why="A loss in bfloat16 moves in steps of 0.06 around 11, and so do its gradients.",
    mend="Call logits.float() before cross_entropy.",
    source="Modalities/modalities#464, marin-community/marin#8217",
    bound="1e-5 relative against the cross entropy in float64 of the logits seen (healthy: 1e-7; "
    "in bfloat16: 5e-5 to 1e-2)",
)
def test_loss_float32(runs: Runs) -> None:
    """The stack computes the loss in float32: its value, and not only its dtype, is that of float32."""
    plain = Recipe(updates=4)
    variants = [plain, replace(plain, logits="compute")] if runs.has("logits-opt-out") else [plain]
    for name in runs.precisions():
        for recipe in (replace(variant, precision=name) for variant in variants):
            run = runs.trace(recipe)
            forwards = run.training_forwards()
            entropies = [entropy for entropy in run.entropies if entropy.grad_enabled]
            if stays_inside(forwards, entropies):  # their gate sees in which dtype they are computed
                found = {f"cross entropy {i} under {name}": entropy.dtype for i, entropy in enumerate(entropies)}
                precision.dtypes_are(found, torch.float32, "the loss computed")
                continue
            losses = cross_entropies(runs, recipe, run)
            if not forwards or len(forwards) != len(losses):
                raise NotApplicable(f"{len(forwards)} training forwards, but {len(losses)} losses: cannot pair them")
            pairs = [(*with_targets(recipe, f), loss) for f, loss in zip(forwards, losses, strict=True)]
            if runs.asks("0.2"):
                require_no_other_term(pairs)
            # A factor that all updates share is no matter of precision: a loss scaler's, or another count of tokens.
            factor = precision.shared_factor(pairs)
            for scores, targets, loss in pairs:
                precision.loss_in_float32(scores, targets, loss / factor)


def require_no_other_term(pairs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Raise NotApplicable if losses in float32 have a term beside the cross entropy: that is not a matter of precision.

    Args:
        pairs: logits (B, T, V), targets (B, T) and loss, at least two of each.
    """
    if all(loss.dtype == torch.float32 for _, _, loss in pairs):
        try:
            nothing_else([loss.item() for _, _, loss in pairs], [mean_entropy(scores, t) for scores, t, _ in pairs])
        except Violation as error:
            raise NotApplicable(f"the loss is not the cross entropy alone ({error.seen}): see LOSS-1") from None


def with_targets(recipe: Recipe, forward: Forward) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of a forward that have a next token in the data, and that token.

    Raises:
        Violation: if the ids are not from the recipe.
    """
    for batch in recipe.batches():
        if forward.ids.shape[1] == recipe.block_size and torch.equal(forward.ids.long(), batch[:, :-1]):
            return forward.scores, batch[:, 1:]
        if torch.equal(forward.ids.long(), batch):  # stacks that shift inside the model see all tokens
            return forward.scores[:, :-1], batch[:, 1:]
    raise Violation("the model gets the training data in order", "token ids that are in no batch of the recipe")


@clause(
    "PREC-4",
    since="0.1",
    why="The run computes in a precision other than the configured one: slower, or less exactly, than its user "
    "believes.",
    mend="Raise an error if a precision is not available; do not replace it silently.",
    source="litgpt#1802, #1814; nanoGPT on CPU; Fabric turns 16-mixed into bf16-mixed on the CPU",
    bound="dtypes; and logits under 32-true are not all bfloat16 numbers. Autocast to the dtype of the weights casts "
    "nothing, and counts as off",
)
def test_precision_asked_for(runs: Runs) -> None:
    """Weights have the dtype of the precision asked for, before and after training, and the forward computes in it."""
    for name in runs.precisions():
        run = runs.trace(Recipe(precision=name))
        precision.dtypes_are({n: info.dtype for n, info in run.tensors.items()}, WEIGHTS[name], f"weights under {name}")
        after = {n: t.dtype for n, t in run.update(-1).after.items()}
        precision.dtypes_are(after, WEIGHTS[name], f"weights after training under {name}")
        autocast = COMPUTE[name] if name.endswith("-mixed") else None
        # torchtitan computes inside an autocast in all precisions. To the dtype of the weights it casts nothing.
        found = {None if f.autocast == WEIGHTS[name] else f.autocast for f in run.training_forwards()}
        if found != {autocast}:
            raise Violation(
                f"autocast to {autocast} inside the forward under {name}"
                if autocast
                else f"no autocast inside the forward under {name}, or one to {WEIGHTS[name]}",
                f"autocast is {', '.join(sorted('off' if kind is None else f'to {kind}' for kind in found))}",
            )
        precision.content_is([f.scores for f in run.training_forwards()], rounded=name.startswith("bf16"))


@clause(
    "PREC-5",
    since="0.1",
    why="Backward and optimizer steps inside autocast compute in 16 bits what must be in 32.",
    mend="Close the autocast context after the forward (and the loss).",
    source="pytorch#120376, luyug/GradCache#17",
    bound="off",
)
def test_autocast_only_in_forward(runs: Runs) -> None:
    """Autocast is off when the backward and the optimizer step begin."""
    for name in runs.precisions():
        run = runs.trace(Recipe(precision=name))
        if any(loss.autocast for loss in run.losses):
            raise Violation("autocast off when backward begins", f"it is on, under {name}")
        if any(update.autocast for update in run.updates):
            raise Violation("autocast off when the optimizer steps", f"it is on, under {name}")


@clause(
    "PREC-6",
    since="0.1",
    needs=("keywords", "bf16-true"),
    why="Updates below half a unit in the last place vanish: norms and large weights stop learning at small rates.",
    mend="Keep float32 master weights or round stochastically; or warn the user that small updates are lost.",
    source="pytorch/ao#1124, torchtune#2254, NVIDIA/Model-Optimizer#2322",
    bound="movement of at least half the float32 run's (healthy: 0.99; lost: 0.05), or a message about rounding",
)
def test_small_updates(runs: Runs) -> None:
    """Small updates survive the rounding of bfloat16 weights, or the trainer warns that they are lost."""
    choice = OptimizerChoice.of(ADAMW, lr=1e-6, weight_decay=0.0)
    recipe = Recipe(precision="bf16-true", optimizer=choice, updates=4)
    coarse, exact = runs.trace(recipe), runs.trace(replace(recipe, precision="32-true"))
    if not precision.movement(exact.initial, exact.update(-1).moved_to):
        raise Violation("weights that move in float32", "no weight moves")
    ratio = precision.movement(coarse.initial, coarse.update(-1).moved_to) / precision.movement(
        exact.initial, exact.update(-1).moved_to
    )
    told = [line for line in coarse.messages if ("bf16" in line or "bfloat16" in line) and mentions_rounding(line)]
    if ratio < precision.MOVEMENT_BOUND and not told:
        raise Violation(
            "weights that move at least half as far as in float32, or a warning",
            f"they move {ratio:.1%} as far, and none of {len(coarse.messages)} messages speaks of rounding",
        )


def mentions_rounding(line: str) -> bool:
    """Return True if a message is about updates that get lost."""
    return any(word in line for word in ("round", "lost", "master weights", "stochastic"))


@clause(
    "PREC-7",
    since="0.1",
    needs=("bf16-true", "llama-shape"),
    why="With phases in bfloat16, positions beyond 256 collide, and the model cannot tell where a token stands.",
    mend="Compute the phase in float32 and round only the finished cos and sin.",
    source="transformers#25681, #29285, EleutherAI/gpt-neox#1003, KellerJordan/modded-nanogpt#39",
    bound="2^-8 (healthy: at most 2^-9, one rounding; a phase in bfloat16: 0.04 at 64 positions)",
)
def test_rotary_tables(runs: Runs) -> None:
    """The position tables of a bfloat16 model are those of the float32 model, rounded once."""
    recipe = Recipe(shape="llama", block_size=64, updates=1)
    exact, coarse = runs.trace(recipe), runs.trace(replace(recipe, precision="bf16-true"))
    # Tables by position only: a buffer of frequencies, from which forward computes the phase anew, shows nothing.
    tables = {n: t for n, t in exact.buffers.items() if t.is_floating_point() and recipe.block_size in t.shape}
    if not tables:
        raise NotApplicable("the model keeps no table by position; it computes positions anew in each forward")
    precision.tables_close(tables, coarse.buffers)


@clause(
    "PREC-8",
    since="0.2",
    level="should",
    why="A part of the model that computes in float32 costs twice the time and memory; one that computes in 16 bits "
    "under 32-true loses more than half of its decimal digits.",
    mend="Look for an autocast that is switched off around some modules, and for casts of weights or inputs: of "
    "queries, keys and values for a kernel, say.",
    source="Lightning-AI/lightning-thunder#725 (autocast not applied to some operations), Pointcept/Pointcept#352 "
    "(queries, keys and values are halved for the kernel)",
    bound="dtype of the output of each nn.Linear but the head; under 32-true, values in its input that are no bfloat16 "
    "numbers (64 values are such numbers by chance with 2^-1024)",
)
def test_linears_compute_as_asked(runs: Runs) -> None:
    """In training, every linear layer except the head computes in the precision that the user asked for, and under
    32-true what it gets was not rounded to 16 bits on the way.
    """
    seen_any = False
    for name in runs.precisions():
        run = runs.trace(Recipe(precision=name))
        for forward in run.training_forwards():
            inner = dict(list(forward.linears.items())[:-1])  # the head is called last
            seen_any |= bool(inner)
            precision.dtypes_are(inner, COMPUTE[name], f"outputs of linear layers under {name}")
            if name == "32-true" and forward.rounded and not starts_rounded(run):
                raise Violation(
                    "inputs of linear layers in float32 under 32-true",
                    f"what goes into {quoted(forward.rounded)} was rounded to bfloat16 before: all of its values are "
                    "bfloat16 numbers",
                )
    if not seen_any:
        raise NotApplicable("the model calls no nn.Linear but its head")


def starts_rounded(run: Trace) -> bool:
    """Return True if an embedding starts with bfloat16 numbers alone.

    In a model without a norm in front of its first linear layer, they are what goes into that one.
    """
    tables = [run.initial.get(f"{info.name}.weight") for info in run.embeddings]
    return any(table is not None and precision.holds_only(table, torch.bfloat16) for table in tables)


@clause(
    "PREC-9",
    since="0.2",
    needs=("compile", "load", "any-optimizer"),
    level="should",
    why="A branch that only compiled code takes, or a weight that compiled code has copied, trains another model than "
    "the one that was tested without torch.compile.",
    mend="Look for torch.compiler.is_compiling(), and for tensors and numbers that the first call fixes. Compile with "
    "the backend 'eager', then with 'aot_eager', to see which part of torch.compile changes the weights.",
    source="pytorch#113180 (a higher loss with torch.compile), #115607",
    bound="1 % of each tensor's movement in two updates (healthy on a CPU: 0; the weakest mutant: 12 %)",
)
def test_compiled_as_without(runs: Runs) -> None:
    """Training with torch.compile ends with the same weights as training without it, within rounding."""
    short = Recipe(microbatch_size=2, updates=2, save_every=1, optimizer=DESCENT)
    for recipe in shapes(runs, short)[:1]:
        plain = runs.trace(recipe)
        start, expected = (runs.load(saved(plain, update)).state_dict() for update in (1, 2))
        try:
            fast = runs.compiled(replace(recipe, save_every=recipe.updates))
        except RunFailed as failed:
            raise Violation("a run with torch.compile that trains to its end", str(failed)) from failed
        precision.moved_alike(start, expected, runs.load(saved(fast, recipe.updates)).state_dict())


@clause(
    "PREC-11",
    since="0.2",
    needs=("bf16-mixed", "residual-opt-out"),
    why="A user who asks for a residual stream in 16 bits, to save memory traffic, pays for one in float32.",
    mend="Convert the residual stream where it begins, under autocast. If your stack has no such option, name "
    "residual-opt-out in lacks.",
    source="Lightning-AI/litgpt at c0415056 (an option that is accepted and never used); Megatron-LM has the option",
    bound="different bits",
)
def test_residual_opt_out(runs: Runs) -> None:
    """If the user asks for a residual stream in 16 bits in a mixed precision, the logits are rounded otherwise than
    with one in float32.
    """
    recipe = Recipe(precision="bf16-mixed")
    opted = replace(recipe, residual="compute")
    first = [runs.trace(each).training_forwards(0) for each in (recipe, opted)]
    runs.require_read(opted, "residual", "residual-opt-out")
    pairs = list(zip(*first))
    if not pairs:
        raise NotApplicable("no forward in training mode and with gradients: see ACC-6")
    if all(torch.equal(one.scores, other.scores) for one, other in pairs):
        raise Violation(
            "other logits with a residual stream in 16 bits than with one in float32",
            "they are equal, bit for bit: the option does nothing",
        )
