"""What the scripts torchtitan-*.py share: runs of torchtitan.train.Trainer on one device, with a small Llama 3.

The model, the data and the tokenizer are registered as torchtitan's docs/extension.md and docs/datasets.md have it. On
a machine without an accelerator, torchtitan takes the CPU for its device, which then has to have a name and figures of
its memory.
"""

import contextlib
import io
import logging
import os
import socket
import tempfile
import types
import warnings
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import torch


def stand_in():
    """Give the CPU the names and memory figures that torchtitan asks an accelerator for."""
    barrier, cpu = torch.distributed.barrier, torch.cpu
    torch._utils._get_available_device_type, torch._utils._get_device_module = (lambda: "cpu"), (lambda _: cpu)
    torch.distributed.barrier = lambda *_, **__: barrier()
    cpu.get_device_name, cpu.memory_stats = (lambda *_: "CPU"), (lambda *_: {})
    cpu.get_device_properties = lambda *_: types.SimpleNamespace(total_memory=1 << 30)
    cpu.reset_peak_memory_stats = cpu.empty_cache = lambda *_: None


warnings.simplefilter("ignore")
if not torch.accelerator.is_available():
    stand_in()  # before torchtitan is imported

from datasets import Dataset  # noqa: E402  # after the stand-in, as all of torchtitan
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402  # after the stand-in
from torchtitan.config import ConfigManager  # noqa: E402  # after the stand-in
from torchtitan.hf_datasets import DatasetConfig  # noqa: E402  # after the stand-in
from torchtitan.hf_datasets.text_datasets import DATASETS  # noqa: E402  # after the stand-in
from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec  # noqa: E402  # after the stand-in
from torchtitan.protocols.train_spec import register_train_spec  # noqa: E402  # after the stand-in
from torchtitan.train import Trainer  # noqa: E402  # after the stand-in

LENGTH, VOCABULARY = 16, 128


def texts(count, tokens, seed):
    """Return documents of so many tokens, as a data set that is streamed."""
    rows = torch.randint(VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(seed))
    words = [" ".join(map(str, row)) for row in rows.tolist()]
    return lambda _: Dataset.from_dict({"text": words}).to_iterable_dataset()


def train(*words, documents=LENGTH + 1, watch=None):
    """Train, and return the lines that torchtitan logged.

    Args:
        words: more of the command line.
        documents: tokens of each.
        watch: is given the Trainer before it trains.
    """
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    model = TransformerModelArgs(dim=32, n_layers=2, n_heads=2, vocab_size=VOCABULARY, multiple_of=32)
    said = io.StringIO()
    logging.basicConfig(stream=said, level=logging.INFO, force=True, format="%(message)s")
    logging.captureWarnings(True)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        register_train_spec(folder, replace(get_train_spec(), model_args={"small": model}))
        DATASETS["own"] = DatasetConfig("", texts(200, LENGTH + 1, 1), itemgetter("text"))
        DATASETS["held-out"] = DatasetConfig("", texts(5, documents, 2), itemgetter("text"))
        tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(VOCABULARY)}))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(Path(folder, "tokenizer.json")))
        given = f"""--job.dump-folder={folder} --model.name={folder} --model.flavor=small
            --model.hf-assets-path={folder} --training.dataset=own --training.seq-len={LENGTH}
            --training.local-batch-size=2 --debug.seed=1
            --lr-scheduler.warmup-steps=0 --lr-scheduler.decay-ratio=0.0 --metrics.log-freq=1
            --metrics.disable-color-printing --validation.dataset=held-out --validation.seq-len={LENGTH}
            --validation.local-batch-size=2""".split()
        trainer = Trainer(ConfigManager().parse_args([*given, *words]))
        if watch is not None:
            watch(trainer)
        trainer.train()
        trainer.close()
        torch.distributed.destroy_process_group()
    return said.getvalue().splitlines()
