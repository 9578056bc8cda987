"""What each command but ``train`` takes and does."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from reference.cli.options import read
from reference.cli.presets import fine_tuning
from reference.cli.progress import waiting
from reference.cli.settings import Settings
from reference.cli.starting import checkpoint_folder
from reference.cli.train import logged
from reference.config import DataConfig, GPTConfig, TrainConfig
from reference.errors import ConfigurationError, printable, quoted
from reference.files import write_file

logger = logging.getLogger("reference")


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Turn text files into the token files that training reads."""

    text: list[str] = field(default_factory=list)
    """files, folders or patterns to read; if none is given, the sources of Python's standard library"""
    record_field: str | None = field(default=None, metadata={"option": "field"})
    """the field, or column, of records (JSON lines, CSV, Parquet) that holds a text, or a list of chat messages: each
    record is then a document; null: each file is one"""
    tokenizer: str = "bytes"
    """how to make tokens: bytes, bpe:SIZE (trained on the text), or the path of a tokenizer.json"""
    end_of_document: str | None = None
    """the token of a tokenizer.json that ends a document, such as <eos>; null: the first usual name that it has"""
    out: Path | None = None
    """the folder to write to; required with --text, otherwise data/standard-library"""
    validation_share: float = 0.05
    """the share of the text that is kept for validation"""
    seed: int = 1337
    """the seed that chooses which text is kept for validation"""
    overwrite: bool = field(default=False, metadata={"flag": True})
    """replace the data in the folder even if another tokenizer wrote it"""


def prepare_command(words: Sequence[str]) -> int:
    """Turn text files into token files; return the exit code."""
    examples = (
        "  python -m reference prepare                                            this Python's standard library\n"
        "  python -m reference prepare --text notes.txt letters/ --out data/mine  files, and all below a folder\n"
        "  python -m reference prepare --text 'books/**/*.txt' --tokenizer bpe:8192 --out data/books\n"
        "  python -m reference prepare --text stories.jsonl --field text --tokenizer bpe:8192 --out data/stories\n"
        "  python -m reference prepare --text books/ --tokenizer path/to/tokenizer.json --out data/books\n"
        "  python -m reference prepare --text chats.jsonl --field messages --tokenizer model/ --out data/chats"
    )
    options = read("prepare", PrepareOptions, examples, words)
    if options.out is None and options.text:
        raise ConfigurationError("--text needs --out, the folder to write to, for example --out data/mine.")
    with waiting("Loading"):
        from reference.data.prepare import prepare

    with logged():
        written = prepare(
            options.text,
            options.tokenizer,
            options.out or Path(DataConfig().path),
            validation_share=options.validation_share,
            seed=options.seed,
            end_of_document=options.end_of_document,
            overwrite=options.overwrite,
            progress=True,
            field=options.record_field,
        )
    print(printable(written.describe()))
    return 0


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Continue a text with a trained model."""

    checkpoint: Path
    """the folder of a checkpoint, or of a run, whose newest checkpoint is then used"""
    prompt: str = ""
    """the text to continue; if it is empty, the model begins a new document"""
    tokens: int = 200
    """the largest number of tokens to generate"""
    temperature: float = 1.0
    """how random the choice of tokens is; 0 always takes the most probable token"""
    top_k: int | None = None
    """draw only from this many of the most probable tokens; null: from all"""
    top_p: float | None = None
    """draw only from the most probable tokens whose probabilities add up to this; null: from all"""
    seed: int | None = None
    """the seed of the choice; null: another text each time"""


def generate_command(words: Sequence[str]) -> int:
    """Print what a model makes of a prompt, as it comes; return the exit code."""
    examples = (
        "  python -m reference generate --checkpoint out/tiny --prompt 'def '\n"
        "  python -m reference generate --checkpoint out/tiny --tokens 500 --temperature 0.8 --top_p 0.95 --seed 1\n"
        "  python -m reference generate --checkpoint out/tiny/step-00000200 --prompt 'import ' --temperature 0"
    )
    options = read("generate", GenerateOptions, examples, words)
    with waiting("Loading PyTorch"):
        import torch

        from reference.checkpoint import load_for_inference
        from reference.data.tokenizer import load_tokenizer
        from reference.model.generation import generate

    with logged():
        with waiting("Loading"):
            checkpoint = checkpoint_folder(options.checkpoint)
            model = load_for_inference(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
            tokenizer = load_tokenizer(checkpoint)  # after it: damage of the checkpoint is told as such
        ids = generate(
            model,
            tokenizer.encode(options.prompt) or [tokenizer.end_of_document],
            tokens=options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            end=tokenizer.end_of_document,
            vocab_size=tokenizer.vocab_size,
        )
        print(options.prompt, end="", flush=True)
        for piece in tokenizer.stream(ids):
            print(piece, end="", flush=True)
        print()
    return 0


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure the loss of a checkpoint over a split, or over its first batches."""

    checkpoint: Path
    """the folder of a checkpoint, or of a run, whose newest checkpoint is then used"""
    data: Path
    """the folder that prepare wrote"""
    split: Literal["train", "validation"] = "validation"
    """the part of the data to measure"""
    microbatch_size: int = 8
    """the number of sequences to compute at a time"""
    batches: int | None = None
    """evaluate only this many of the first batches; null: all of the split"""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """the precision to compute in"""


def evaluate_command(words: Sequence[str]) -> int:
    """Print the loss of a checkpoint on data; return the exit code."""
    examples = (
        "  python -m reference evaluate --checkpoint out/tiny --data data/standard-library\n"
        "  python -m reference evaluate --checkpoint out/books --data data/books --batches 20 --precision bf16-mixed"
    )
    options = read("evaluate", EvaluateOptions, examples, words)
    with waiting("Loading PyTorch"):
        from reference.cli.evaluation import evaluate_checkpoint

    with logged():
        checkpoint = checkpoint_folder(options.checkpoint)
        config = TrainConfig(precision=options.precision)
        size, batches = options.microbatch_size, options.batches
        with waiting("Evaluating"):
            found = evaluate_checkpoint(checkpoint, options.data, options.split, size, config, batches)
        print(found.describe())
    return 0


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a checkpoint as a folder that from_pretrained of transformers reads."""

    checkpoint: Path
    """the folder of a checkpoint, or of a run, whose newest checkpoint is then used"""
    out: Path
    """the folder to write to; it must be empty or not exist"""
    format: Literal["huggingface", "peft"] = "huggingface"
    """the kind of folder to write: a whole model, or what LoRA trained, as an adapter that peft loads beside one"""


def export_command(words: Sequence[str]) -> int:
    """Write a checkpoint as a folder for transformers; return the exit code."""
    examples = (
        "  python -m reference export --format huggingface --checkpoint out/tiny --out exported\n"
        "  python -m reference export --format peft --checkpoint out/gpt2-tuned --out adapter"
    )
    options = read("export", ExportOptions, examples, words)
    with waiting("Loading PyTorch"):
        from reference.interchange.adapter import export_adapter
        from reference.interchange.huggingface import export_huggingface

    export = export_adapter if options.format == "peft" else export_huggingface
    with logged(), waiting("Exporting"):
        written = export(checkpoint_folder(options.checkpoint), options.out)
    print(printable(f"Written: {written}"))
    return 0


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Make a checkpoint from a folder that save_pretrained of transformers wrote (GPT-2 or Llama)."""

    source: Path = field(metadata={"option": "from"})
    """the folder of the model, with its config.json"""
    out: Path
    """the folder to write to: the checkpoint step-00000000, and a config.yaml to fine-tune it with"""
    format: Literal["huggingface"] = "huggingface"
    """the kind of folder to read"""


def import_command(words: Sequence[str]) -> int:
    """Make a checkpoint from a folder of transformers; return the exit code."""
    examples = (
        "  python -m reference import --format huggingface --from path/to/gpt2 --out out/gpt2\n"
        "  python -m reference generate --checkpoint out/gpt2 --prompt 'Hello'\n"
        "  python -m reference train --init_from out/gpt2 --data data/mine                  fine-tune it"
    )
    options = read("import", ImportOptions, examples, words)
    with waiting("Loading PyTorch"):
        from reference.interchange.huggingface import import_huggingface

    with logged():
        with waiting("Importing"):
            folder = import_huggingface(options.source, options.out)
        print(printable(f"Written: {folder}"))
        write_settings(folder)
    return 0


def write_settings(folder: Path) -> None:
    """Write config.yaml beside an imported checkpoint, for a run that fine-tunes it; one that is there is kept."""
    from reference.checkpoint import load_config

    path, saved = folder.parent / "config.yaml", load_config(folder)
    if path.exists():
        logger.warning("import: %s is there already and stays as it is, but it may describe another model", path)
        return
    data = f"data/{folder.parent.resolve().name}"
    run = fine_tuning(GPTConfig(**saved["model"]), data)
    shape = "gpt2-124m" if run.model.position == "learned" else "llama-1.2b"
    settings = Settings(shape, run.model, run.train, run.data, str(folder.parent), resume="auto")
    write_file(path, settings.yaml().encode())
    print(printable(f"Written: {path}"), file=sys.stderr)
    tokenizer = {"bytes": "bytes", None: "TOKENIZER.json"}.get(saved["tokenizer"], folder)
    again = f"python -m reference prepare --text YOUR-TEXT --tokenizer {quoted(tokenizer)} --out {quoted(data)}"
    print(f"To fine-tune it: {again}, then python -m reference train --config {quoted(path)}", file=sys.stderr)
