"""The command line: ``python -m conformance.bench``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from conformance.errors import ConformanceError, UsageError, sentence
from conformance.options import FAILED, INTERRUPTED, USAGE, Parser

EXAMPLES = """\
examples:
  python -m conformance.bench                                all rows, on the GPU (an H100: eight minutes)
  python -m conformance.bench --quick                        few rounds, the small model only (one minute)
  python -m conformance.bench --device cpu                   a small version, which says nothing about a GPU
  python -m conformance.bench --only 8bit --only "fused, fp32"   some rows
  python -m conformance.bench --compare old/summary.json     run, and compare with an earlier run
  python -m conformance.bench --compare old.json new.json    compare two earlier runs
  python -m conformance.bench.page old.json --out FOLDER     a page of what was measured

exit code: 0 all is well, 1 a row is slower than before or broke, 2 the command line was wrong or there is no GPU
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. A mistake of the user's is one sentence on stderr and 2."""
    options = build_parser().parse_args(arguments)
    if sys.stderr.isatty():
        print("Loading PyTorch ...", file=sys.stderr, flush=True)  # which takes seconds
    from conformance.bench import session  # imports torch, which --help does not need

    try:
        return session.compare_files(options) if len(options.compare) == 2 else session.run_bench(options)
    except UsageError as error:
        print(sentence(error), file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # the reader (head, say) has seen enough; Python's exit must not write either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ConformanceError as error:
        print(sentence(error), file=sys.stderr)
        return FAILED
    except OSError as error:  # what no other message tells, such as a disk that is full
        where = f"{error.filename}: " if error.filename else ""
        print(sentence(UsageError(f"{where}{error.strerror or error}.")), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)  # before the first row, or again while the results were written
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = Parser(
        "python -m conformance.bench",
        description="Measure what optimizers, precision and StableEmbedding cost on this GPU, and how close each comes "
        "to the most that the card can do.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what to measure on (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="measure few rows, in few rounds")
    only = "measure only rows with this text in 'group / size / name'; may be repeated"
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help=only)
    limit = (
        "the time for the whole bench: it ends before the first row that would exceed it, and under 300 compiles "
        "nothing ahead"
    )
    parser.add_argument("--limit", type=float, metavar="SECONDS", help=limit)
    out = "the folder to write to (default: reports/bench/CARD; reports/latest for quick, partial and CPU runs)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=out)
    earlier = "one earlier summary.json to compare with this run, or two to compare with each other"
    parser.add_argument("--compare", nargs="+", default=[], type=Path, metavar="FILE", help=earlier)
    parser.add_argument("--across", action="store_true", help="compare even if the card or the versions differ")
    return parser


if __name__ == "__main__":
    sys.exit(main())
