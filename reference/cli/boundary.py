"""What a mistake of the user's can raise deep inside a library, told as one sentence with the setting that it was."""

import re
import traceback

from torch.optim import Optimizer

from reference.cli.settings import Settings
from reference.errors import ConfigurationError, ExplainedError, first_line
from reference.optimizers import find_class, roles
from reference.optimizers.roles import Combined

MEMORY = re.compile(r"out of memory|can't allocate|not enough memory|overflowed|Overflow when unpacking|too large")


def explain(error: BaseException, settings: Settings) -> ExplainedError | None:
    """Return the sentence for an exception that a run has raised, or None if it is a fault of the program.

    An optimizer's class is the user's own, so what any of its methods raises is theirs to mend.
    """
    run, size = settings.train, settings.data.microbatch_size
    said = first_line(error)[:150].rstrip(".")
    if isinstance(error, MemoryError | OverflowError) or MEMORY.search(str(error)):
        return ConfigurationError(
            f"there is not enough memory for the model with microbatches of {size} ({said[:80]}): choose a smaller "
            "--data.microbatch_size and more --train.microbatches (the updates are the same), or a smaller model."
        )
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    called = [(own, f.f_code.co_name) for f in frames if isinstance(own := f.f_locals.get("self"), Optimizer)]
    called = [(own, name) for own, name in called if not isinstance(own, Combined)]
    if not called:
        return None
    role, setting = run, "--train.optimizer"
    for other in roles(run)[1:]:
        if isinstance(called[-1][0], find_class(other.optimizer)):
            role, setting = other, "--train.optimizer_rest"
    cause = f"{type(error).__name__}: {said}"
    if not any(name == "step" for _, name in called):
        return ConfigurationError(
            f"{role.optimizer} cannot be trained with, because its {called[-1][1]}() failed ({cause}): correct it, or "
            f"choose another {setting}."
        )
    return ConfigurationError(
        f"{role.optimizer} cannot make a step with {setting}_args {str(dict(role.optimizer_args))[:100]} "
        f"({cause}): change these, or {setting}."
    )
