"""Checkpoints by content: what a run writes is copied when it is noticed, so that a file written over is not lost."""

import contextlib
import re
import shutil
from pathlib import Path

from conformance.recording.trace import Checkpoint, Trace

# Logs, metrics and what is drawn from them: a stack may append to them at every update.
NOT_A_CHECKPOINT = re.compile(r"\.(csv|tsv|log|txt|jsonl|out|err|html|png|svg|lock|tmp)$|\.tfevents|^hparams\.ya?ml$")


class Files:
    """Watches the directory of a run."""

    def __init__(self, directory: Path | None, keep: Path | None) -> None:
        """Remember what is there already.

        Args:
            directory: of the run; None: nothing is watched.
            keep: where copies go; None: none are made.
        """
        self.directory, self.keep = directory, keep
        self.seen: dict[Path, tuple[int, int]] = {}
        self.written()

    def written(self) -> list[Path]:
        """Return the files that are new or changed since the last call."""
        if self.directory is None or not self.directory.is_dir():
            return []
        found = []
        for path in sorted(self.directory.rglob("*")):
            try:
                if not path.is_file() or NOT_A_CHECKPOINT.search(path.name):
                    continue
                if path.is_symlink() and not path.resolve().is_relative_to(self.directory.resolve()):
                    continue  # data that the run reads
                stat = path.stat()
            except OSError:  # removed meanwhile
                continue
            if self.seen.get(path) != (stat.st_mtime_ns, stat.st_size):
                self.seen[path] = (stat.st_mtime_ns, stat.st_size)
                found.append(path)
        return found

    def credit(self, trace: Trace, update: int) -> None:
        """Credit what was written to the checkpoint after ``update`` updates."""
        written = self.written()
        if not written:
            return
        earlier = trace.checkpoint(update)
        if earlier is not None:
            trace.checkpoints.remove(earlier)
            written = [*earlier.files, *(path for path in written if path not in earlier.files)]
        trace.checkpoints.append(Checkpoint(update, tuple(written), copies=self.copies(written, update)))

    def copies(self, written: list[Path], update: int) -> tuple[tuple[Path, int, int], ...]:
        """Return a copy of each file, laid out as in the run's directory, with its time and size."""
        if self.keep is None or self.directory is None:
            return ()
        found = []
        for path in written:
            copy = self.keep / f"after-{update}" / path.relative_to(self.directory)
            copy.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile, as with keep_last=1
                shutil.copyfile(path, copy)  # not a link: torch.save truncates the file in place
            found.append((copy, *self.seen[path]))
        return tuple(found)
