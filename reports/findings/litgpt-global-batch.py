"""LitGPT: a global batch size that is no multiple of the micro batch size is floored without a word.

Trains with pretrain.setup and counts the sequences that the model is shown before each optimizer step.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import torch
from litgpt import pretrain
from litgpt.args import TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader


class Tokens(DataModule):
    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.train_dataloader = self.val_dataloader = lambda: DataLoader(torch.randint(128, (512, 17)), batch_size)


counts = []
forward = pretrain.GPT.forward


def counted(self, idx, *args, **keywords):
    if self.training and not idx.is_meta:
        counts[-1] += len(idx)
    return forward(self, idx, *args, **keywords)


pretrain.GPT.forward = counted
register_optimizer_step_post_hook(lambda *_: counts.append(0))
sys.argv = ["litgpt", "pretrain", "any"]  # is parsed when a checkpoint is saved
torch.compiler.set_stance("force_eager")  # pretrain.main compiles; that would only cost time here
config = Config(n_layer=1, n_head=2, n_embd=32, block_size=16, padded_vocab_size=128, rotary_percentage=1.0)
for asked, micro in ((8, 4), (10, 4), (64, 12), (240, 16), (250, 16)):
    counts[:] = [0]
    train = TrainArgs(global_batch_size=asked, micro_batch_size=micro, max_tokens=2 * asked * 16, max_norm=1.0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        pretrain.setup("any", config, Path(folder), precision="32-true", devices=1, logger_name="csv", data=Tokens(),
                       train=train)  # fmt: skip
    said = said.getvalue().splitlines()  # the hyperparameters are printed in any case: "'global_batch_size': 10,"
    lines = [line for line in said if "batch" in line and "_batch_size'" not in line]
    print(f"global_batch_size {asked:3}, micro_batch_size {micro:2}: {counts[0]:3} sequences in the first update, "
          f"{counts[1]:3} in the second; lines about it: {lines}")  # fmt: skip
