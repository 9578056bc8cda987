"""What a mistake of the user's can raise deep inside a library, told as one sentence with the setting that it was."""

import re
import traceback

from torch.optim import Optimizer

from reference.cli.settings import Settings
from reference.errors import ConfigurationError, ExplainedError, first_line
from reference.optimizers import find_class, roles

MEMORY = re.compile(r"out of memory|can't allocate|not enough memory|overflowed|Overflow when unpacking|too large")


def explain(error: Exception, settings: Settings) -> ExplainedError | None:
    """Return the sentence for an exception that a run has raised, or None if it is a fault of the program."""
    run, size = settings.train, settings.data.microbatch_size
    said = first_line(error)[:150].rstrip(".")
    if isinstance(error, MemoryError | OverflowError) or MEMORY.search(str(error)):
        return ConfigurationError(
            f"there is not enough memory for the model with microbatches of {size} ({said[:80]}): choose a smaller "
            "--data.microbatch_size and more --train.microbatches (the updates are the same), or a smaller model."
        )
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "step"]
    stepped = [own for frame in frames if isinstance(own := frame.f_locals.get("self"), Optimizer)]
    if not stepped:
        return None
    role, setting = run, "--train.optimizer"
    for other in roles(run)[1:]:
        if isinstance(stepped[-1], find_class(other.optimizer)):
            role, setting = other, "--train.optimizer_rest"
    return ConfigurationError(
        f"{role.optimizer} cannot make a step with {setting}_args {str(dict(role.optimizer_args))[:100]} "
        f"({type(error).__name__}: {said}): change these, or {setting}."
    )
