"""The clauses, one file per chapter. Run them with pytest: ``pytest --pyargs conformance.suites --subject ...``."""

from conformance.clause import NotApplicable
from conformance.recipe import Recipe
from conformance.subject import Subject


def shapes(subject: Subject, **changes: object) -> list[Recipe]:
    """A recipe for each model shape that the subject has, with any field changed.

    Raises:
        NotApplicable: if it has none.
    """
    found = [
        Recipe(shape=shape, **changes)  # type: ignore[arg-type] # the fields are checked by the dataclass's users
        for shape in ("gpt", "llama")
        if f"{shape}-shape" not in subject.lacks
    ]
    if not found:
        raise NotApplicable("lacks both gpt-shape and llama-shape")
    return found
