"""What the scripts nanochat-*.py share: a run of scripts.base_train of a checkout, watched by PyTorch's own hooks."""

import contextlib
import gc
import io
import os
import pickle
import runpy
import sys
from pathlib import Path

import pyarrow
import tiktoken
import torch
from pyarrow import parquet
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

LENGTH = 16  # tokens of a row without the last target; documents have as many and <|bos|>
SMALL = {"device-type": "cpu", "core-metric-every": -1, "sample-every": -1, "eval-every": -1, "model-tag": "run",
         "depth": 2, "aspect-ratio": 16, "head-dim": 16, "max-seq-len": LENGTH, "device-batch-size": 2,
         "total-batch-size": 2 * LENGTH, "warmup-steps": 0}  # fmt: skip


def write_data(folder):
    """Write a tokenizer of single bytes, and 4096 documents in row groups of 1024, as nanochat's shards have them."""
    for name in ("tokenizer", "base_data_climbmix"):
        Path(folder, name).mkdir()
    encoding = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|bos|>": 256})  # fmt: skip
    Path(folder, "tokenizer", "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    torch.save(torch.ones(257, dtype=torch.int64), Path(folder, "tokenizer", "token_bytes.pt"))
    table = pyarrow.table({"text": [f"{number:0{LENGTH - 1}d}." for number in range(4096)]})
    for name in ("shard_0", "shard_1"):
        parquet.write_table(table, Path(folder, "base_data_climbmix", f"{name}.parquet"), row_group_size=1024)


class Run:
    """What a run of base_train did."""

    def __init__(self, folder, **settings):
        """Run base_train in its checkout, given on the command line; the text of a document is its number."""
        checkout, self.updates, self.documents, self.losses = Path(sys.argv[1]).resolve(), [], [], []
        if not (checkout / "scripts/base_train.py").exists():
            sys.exit(f"{checkout} is no checkout of nanochat: it has no scripts/base_train.py.")
        os.environ["NANOCHAT_BASE_DIR"] = folder
        handles = [
            register_module_forward_pre_hook(self.called),
            register_module_forward_hook(self.returned),
            register_optimizer_step_post_hook(self.stepped),
        ]
        torch.compiler.set_stance("force_eager")  # compiling would only cost time here
        settings = SMALL | {name.replace("_", "-"): value for name, value in settings.items()}
        sys.argv[:], arguments = ["base_train", *(f"--{name}={value}" for name, value in settings.items())], sys.argv[:]
        sys.path.insert(0, str(checkout))
        printed = io.StringIO()
        with contextlib.chdir(checkout), contextlib.redirect_stdout(printed), contextlib.ExitStack() as stack:
            for handle in handles:
                stack.callback(handle.remove)
            runpy.run_module("scripts.base_train", run_name="__main__")
        for name in [name for name in sys.modules if name.partition(".")[0] in ("nanochat", "scripts")]:
            del sys.modules[name]  # they have read the environment
        gc.enable()
        sys.argv[:], self.printed = arguments, printed.getvalue().splitlines()

    def called(self, module, args):
        if type(module).__name__ == "GPT" and torch.is_grad_enabled():
            self.documents.append([int(bytes(row[1:]).decode()) for row in args[0].tolist()])

    def returned(self, module, args, output):
        if type(module).__name__ == "GPT" and torch.is_grad_enabled():
            self.losses.append(output.item())

    def stepped(self, optimizer, args, kwargs):
        self.updates.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])
