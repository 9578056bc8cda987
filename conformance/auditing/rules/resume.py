"""A resume: what a checkpoint held, and what training began with."""

from conformance.auditing.facts import Facts
from conformance.auditing.held import steps
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.errors import NotApplicable, Violation, quoted


def read_something(facts: Facts) -> None:
    """Raise NotApplicable if the run read no checkpoint."""
    if not facts.noticed.reads:
        raise NotApplicable("torch.load read no dictionary before training began")


def goes_on(facts: Facts) -> None:
    """Raise NotApplicable if the run takes no more than weights from what it read."""
    begun = any(bool(entry) for update in facts.updates[:1] for entry in update.state_before.values())
    if not facts.noticed.asked and not begun:
        raise NotApplicable("the run does not say that it resumes, and does not load an optimizer's state")


def is_resume(facts: Facts) -> bool:
    """Return True if a checkpoint that was read is of a run that is to go on."""
    return any(read.moments or read.counted for read in facts.noticed.reads)


@rule(
    "resume-found",
    "resume",
    why="A run that was to go on and begins afresh burns days before anybody sees it.",
    mend="Raise an error where the checkpoint is not there; begin afresh only where that is asked for.",
    source="pytorch/torchtitan#1311",
    advice=True,
)
def checkpoint_is_there(seen: Seen) -> None:
    """A checkpoint that the command line names is there."""
    noticed = seen.facts.noticed
    if noticed.absent and not noticed.reads:
        raise Violation("a file to resume from", f"the run began without it: there is no {quoted(noticed.absent)}")
    if not noticed.absent:
        read_something(seen.facts)


@rule(
    "resume-names",
    "resume",
    why="With strict=False a checkpoint whose names have another prefix loads nothing, and says nothing.",
    mend="Strip the prefix (`_orig_mod.`, `module.`) when saving, and load with strict=True.",
    source="pytorch#101107, LLMs-from-scratch#580",
)
def names_fit(seen: Seen) -> None:
    """When a module loads a state, the names in it match those of the module's tensors."""
    loads = seen.facts.noticed.loads
    if not loads:
        raise NotApplicable("load_state_dict of a module was not called before training began")
    for load in loads:
        if load.given and not load.taken:
            raise Violation(f"names that {load.kind} knows", f"it takes none of the {load.given} tensors it is given")


@rule(
    "resume-weights",
    "resume",
    why="Weights that are drawn again after the load make a resume, or a fine-tuning, begin from nothing.",
    mend="Load last: after the initialisation, after tying, after resizing.",
    source="transformers#46620, #45591",
)
def weights_are_loaded(seen: Seen) -> None:
    """Training begins with the weights that were loaded."""
    noticed = seen.facts.noticed
    if not noticed.loaded:
        raise NotApplicable("no tensor of the model was loaded by load_state_dict before training began")
    if noticed.overwritten:
        words = f"{len(noticed.overwritten)} of {noticed.loaded} changed after the load: {quoted(noticed.overwritten)}"
        most = len(noticed.overwritten) > noticed.loaded / 2
        raise (Violation if most else Doubt)("the loaded weights at the first forward", words)


@rule(
    "resume-precision",
    "resume",
    why="A checkpoint of 16-bit weights has lost 16 of their bits: every resume moves all weights by rounding.",
    mend="Save the float32 weights that the optimizer owns.",
    source="nanotron#245, Megatron-LM#1359",
)
def weights_are_whole(seen: Seen) -> None:
    """The checkpoint of a resume holds weights in the precision in which they are trained."""
    facts = seen.facts
    read_something(facts)
    coarse = sum(load.coarse for load in facts.noticed.loads)
    if not is_resume(facts) or not facts.noticed.loads:
        raise NotApplicable("what was read is not the checkpoint of a run that goes on")
    if coarse:
        raise Violation("float32 weights in the checkpoint", f"{coarse} tensors in 16 bits go into float32 ones")


@rule(
    "resume-optimizer",
    "resume",
    why="Without its moments an optimizer begins again: the first steps are too long, and the loss jumps later, where "
    "nobody looks. The first loss after the resume is right all the same.",
    mend="Save optimizer.state_dict() and load it into the optimizer that steps, after it was built.",
    source="OneVision-Encoder#65, DeepSpeed#7786",
)
def moments_go_on(seen: Seen) -> None:
    """The optimizer goes on from the state that the checkpoint holds."""
    facts = seen.facts
    read_something(facts)
    steps(facts)
    first = facts.updates[0]
    now = sum(bool(entry) for entry in first.state_before.values())
    saved = sum(read.moments for read in facts.noticed.reads)
    if saved and not now:
        words = f"it holds that of {saved} tensors, the optimizer begins with none"
        # A checkpoint of training may also be what a new run, such as fine-tuning, takes its weights from.
        raise (Violation if facts.noticed.asked else Doubt)("the optimizer's state from the checkpoint", words)
    later = any(entry for entry in first.state_after.values())
    if not saved and is_resume(facts) and not now and later:
        # Without a word of a resume it may be a pretrained model, whose checkpoint tells how long it was trained.
        raise (Violation if facts.noticed.asked else Doubt)(
            "a checkpoint with the optimizer's state", "it counts steps, and holds no state of an optimizer"
        )
    if not saved:
        raise NotApplicable("what was read holds no state of an optimizer")


@rule(
    "resume-schedule",
    "resume",
    why="A schedule that begins again warms up a second time, or trains at the peak rate for too long.",
    mend="Save and load scheduler.state_dict(); build the scheduler before the optimizer's state is loaded.",
    source="EvolvingLMMs-Lab/OneVision-Encoder#65, accelerate#963",
)
def schedule_goes_on(seen: Seen) -> None:
    """The first rate after a resume is the one that the checkpoint's schedule gives."""
    facts = seen.facts
    read_something(facts)
    saved = {rate for read in facts.noticed.reads for rate in read.rates}
    if not saved:
        raise NotApplicable("what was read holds no state of a schedule of torch.optim")
    goes_on(facts)
    steps(facts)
    first = {float(group.settings["lr"]) for group in facts.updates[0].groups if "lr" in group.settings}
    if first and not any(abs(a - b) <= 1e-6 * max(abs(a), abs(b)) for a in first for b in saved):
        told = [", ".join(f"{rate:.4g}" for rate in sorted(rates)) for rates in (saved, first)]
        peaks = {peak for read in facts.noticed.reads for peak in read.peaks}
        began = {float(g.settings["initial_lr"]) for g in facts.updates[0].groups if "initial_lr" in g.settings}
        same = bool(began) and began <= peaks and facts.noticed.asked  # otherwise another schedule may be meant
        raise (Violation if same else Doubt)(
            f"a first rate of {told[0]}, which the checkpoint's schedule has reached", told[1]
        )


@rule(
    "resume-generator",
    "resume",
    why="A generator that begins again repeats the dropout masks, and often the order of the data, of the first run.",
    mend="Set the generators to the states that were saved: torch.set_rng_state, torch.cuda.set_rng_state_all.",
    source="transformers#17032, fairseq2#1038",
)
def generator_goes_on(seen: Seen) -> None:
    """The generator is set to the state that the checkpoint holds."""
    noticed = seen.facts.noticed
    read_something(seen.facts)
    saved = {state for read in noticed.reads for state in read.generators}
    if not saved:
        raise NotApplicable("what was read holds no state of PyTorch's generator")
    goes_on(seen.facts)
    if not saved & {*noticed.restored, *noticed.states[:1]}:
        raise (Violation if noticed.asked else Doubt)(
            "the generator's state from the checkpoint", "nobody set the generator to it"
        )
