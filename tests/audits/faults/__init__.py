"""Faults planted in the honest scripts, one row each: data, not code. Sources are published bugs or field notes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One text of an honest script replaced by another.

    ``words`` is a regular expression: a finding names this fault if it matches. ``also`` are further replacements.
    ``before`` are the arguments of an unrecorded run that leaves a checkpoint for the audited one; ``broken_before``
    says that this first run has the fault, too.
    """

    script: str
    title: str
    old: str
    new: str
    source: str
    words: str
    also: tuple[tuple[str, str], ...] = ()
    ranks: int = 1
    arguments: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    broken_before: bool = True
    updates: int = 4
    both_watched: bool = False
    """The run that leaves the checkpoint is audited, too: by ``--resume-with``."""

    @property
    def id(self) -> str:
        """Return a short name that is unique among the faults."""
        return f"{self.script}: {self.title}"

    def planted(self, text: str) -> str:
        """Return the script's text with the fault in it; raise ValueError where the text to replace is not there once."""
        for old, new in ((self.old, self.new), *self.also):
            if text.count(old) != 1:
                raise ValueError(f"{self.id}: {old!r} occurs {text.count(old)} times in {self.script}.py, not once")
            text = text.replace(old, new)
        return text
