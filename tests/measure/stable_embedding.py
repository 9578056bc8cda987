"""Whether StableEmbedding is worth it: 8-bit AdamW with and without it against 32-bit AdamW, afresh and from an import.

``python -m tests.measure.stable_embedding --write reports/stable-embedding`` keeps the figures as JSON and draws them
as SVG, for which matplotlib must be there. It takes some ten minutes on one CPU core.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from conformance.report.environment import environment
from reference import GPTConfig, TokenData, TrainConfig, Trainer, export_huggingface, import_huggingface
from reference.data.prepare import prepare

SEEDS, UPDATES, EVERY = (1, 2, 3), 300, 25
EIGHT_BIT = "bitsandbytes.optim.AdamW8bit"
AFRESH, IMPORTED = "from scratch", "from an import"
WIDE, NARROW, STABLE, FRESH_NORM = (
    "AdamW",
    "AdamW8bit",
    "AdamW8bit, StableEmbedding",
    "AdamW8bit, StableEmbedding, norm 1 and 0",
)
ARMS: dict[str, dict[str, Any]] = {
    WIDE: {"optimizer": "torch.optim.AdamW"},
    NARROW: {"optimizer": EIGHT_BIT},
    STABLE: {"optimizer": EIGHT_BIT, "stable_embedding": True},
    FRESH_NORM: {"optimizer": EIGHT_BIT, "stable_embedding": True},
}
RATES = {AFRESH: 3e-3, IMPORTED: 3e-4}


@dataclass(frozen=True)
class Place:
    """Where a measurement works."""

    data: Path
    vocab_size: int
    sizes: dict[str, int]
    """Of the model and its batches, see :func:`sizes`."""
    folder: Path

    def tokens(self, split: str, seed: int) -> TokenData:
        """The split, in an order of its own for each seed."""
        shape = {"block_size": self.sizes["block_size"], "microbatch_size": self.sizes["batch"]}
        return TokenData(self.data, split, **shape, seed=seed)

    def model(self) -> GPTConfig:
        """Llama's shape, whose head is not tied to the embedding."""
        shape = {name: self.sizes[name] for name in ("block_size", "n_layer", "n_head", "n_embd")}
        return GPTConfig.llama(vocab_size=self.vocab_size, **shape)


def sizes(small: bool) -> dict[str, int]:
    """What is trained; ``small`` only exercises the code."""
    if small:
        return {"block_size": 16, "batch": 2, "n_layer": 1, "n_head": 1, "n_embd": 32, "vocabulary": 400}
    return {"block_size": 64, "batch": 16, "n_layer": 2, "n_head": 2, "n_embd": 64, "vocabulary": 2048}


@contextmanager
def norm_as_it_comes(wanted: bool) -> Iterator[None]:
    """Leave the new norm's gain at 1 and its shift at 0, as bitsandbytes makes it, instead of fitting them."""
    if not wanted:
        yield
        return
    with patch("reference.finetuning.prepare.fit_norm", lambda _: 0.0):
        yield


def curve(place: Place, start: str, arm: str, seed: int, base: Path | None, updates: int) -> dict[str, float]:
    """Validation loss by update of one run; update 1 is the first after the start."""
    settings = TrainConfig(
        updates=updates,
        optimizer_args={"lr": RATES[start], "betas": [0.9, 0.95], "weight_decay": 0.1},
        warmup=min(20, updates // 2) if start == AFRESH else 0,
        evaluate_every=max(1, updates * EVERY // UPDATES),
        evaluate_batches=20,
        accelerator="cpu",
        seed=seed,
        log_every=updates,
        **ARMS[arm],
    )
    trainer = Trainer(place.model() if base is None else None, settings, place.folder / "run")
    with norm_as_it_comes(arm == FRESH_NORM):
        result = trainer.fit(place.tokens("train", seed), place.tokens("validation", 0), init_from=base)
    losses = {str(record.update): record.validation_loss for record in result.records}
    first = {"first training loss": round(result.records[0].loss, 4)}
    return first | {update: round(loss, 4) for update, loss in losses.items() if loss is not None}


def imported(place: Path, checkpoint: Path) -> Path:
    """A trained checkpoint, through the files of transformers, as a model of somebody else's would come."""
    return import_huggingface(export_huggingface(checkpoint, place / "theirs"), place / "ours")


def trained(place: Place, updates: int) -> Path:
    """A run to import: 32-bit AdamW, another seed than those that are measured."""
    args = {"lr": RATES[AFRESH], "betas": [0.9, 0.95], "weight_decay": 0.1}
    run = TrainConfig(updates=updates, optimizer_args=args, warmup=min(20, updates // 2), accelerator="cpu", seed=9)
    run = TrainConfig(**{**vars(run), "save_every": updates, "log_every": updates})
    Trainer(place.model(), run, place.folder / "base").fit(place.tokens("train", 9))
    return place.folder / "base" / f"step-{updates:08d}"


def measured(place: Place, updates: int = UPDATES, seeds: tuple[int, ...] = SEEDS) -> dict[str, Any]:
    """All curves, and by how much the last validation loss of each arm differs from that of 32-bit AdamW."""
    base = imported(place.folder, trained(place, 2 * updates))
    curves: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for start in (AFRESH, IMPORTED):
        for arm in ARMS:
            if arm == FRESH_NORM and start == AFRESH:
                continue  # there the norm is new in any case
            runs = {str(s): curve(place, start, arm, s, base if start == IMPORTED else None, updates) for s in seeds}
            curves.setdefault(start, {})[arm] = runs
            last = [runs[str(seed)][str(updates)] for seed in seeds]
            print(
                f"{start}, {arm}: validation loss {statistics.mean(last):.4f} ({', '.join(map(str, last))})", flush=True
            )
    return {
        "updates": updates,
        "rates": RATES,
        "sizes": place.sizes,
        "curves": curves,
        "difference": differences(curves),
    }


def differences(curves: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """The last validation loss of each arm minus that of 32-bit AdamW with the same seed: mean, smallest, largest."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for start, arms in curves.items():
        for arm, runs in arms.items():
            last = {seed: list(run.values())[-1] - list(arms[WIDE][seed].values())[-1] for seed, run in runs.items()}
            values = list(last.values())
            found.setdefault(start, {})[arm] = {
                "mean": round(statistics.mean(values), 4),
                "smallest": round(min(values), 4),
                "largest": round(max(values), 4),
            }
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw each arm's validation loss minus that of 32-bit AdamW with the same seed: a line per seed."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "stable-embedding", "font.size": 10})
    colours = {NARROW: "#2458b3", STABLE: "#c2571a", FRESH_NORM: "#8a9199"}
    figure, axes = pyplot.subplots(1, 2, figsize=(9.2, 3.4), layout="constrained")
    for axis, (start, arms) in zip(axes, result["curves"].items(), strict=True):
        axis.axhline(0.0, color="#5b6168", linewidth=1, label=WIDE)
        for arm, runs in arms.items():
            for number, (seed, run) in enumerate(runs.items()) if arm != WIDE else ():
                points = {int(update): loss for update, loss in run.items() if update.isdigit()}
                wide = arms[WIDE][seed]
                label = arm if number == 0 else None
                gap = [loss - wide[str(update)] for update, loss in points.items()]
                axis.plot(list(points), gap, color=colours[arm], linewidth=1.2, label=label)
        axis.set_title(start)
        axis.set_xlabel("update")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("validation loss minus AdamW's, nats")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="STEM", help="write STEM.json and STEM.svg")
    parser.add_argument("--small", action="store_true", help="a few updates of a smaller model: exercises the code")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = sizes(arguments.small)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = [str(Path(__file__).parent)] if arguments.small else []
        vocabulary = prepare(text, f"bpe:{shape['vocabulary']}", folder / "data", progress=False).vocab_size
        place = Place(folder / "data", vocabulary, shape, folder)
        result = measured(place, *((6, SEEDS[:1]) if arguments.small else ()))
    result["environment"] = environment()
    if arguments.write:
        arguments.write.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        draw(result, arguments.write.with_suffix(".svg"))


if __name__ == "__main__":
    main()
