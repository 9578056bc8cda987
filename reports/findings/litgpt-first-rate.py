"""LitGPT: with one micro batch per update, the first update of a warm-up has a learning rate of zero.

Trains with pretrain.setup and prints, for each optimizer step, its learning rate and by how much the weights moved.
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
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader


class Tokens(DataModule):
    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.train_dataloader = self.val_dataloader = lambda: DataLoader(torch.randint(128, (64, 17)), batch_size)


def weights(optimizer):
    return torch.cat([p.detach().flatten().clone() for group in optimizer.param_groups for p in group["params"]])


before, steps = [], []
register_optimizer_step_pre_hook(lambda optimizer, *_: before.append(weights(optimizer)))
register_optimizer_step_post_hook(
    lambda optimizer, *_: steps.append(
        (optimizer.param_groups[0]["lr"], (weights(optimizer) - before[-1]).abs().sum().item())
    )
)
sys.argv = ["litgpt", "pretrain", "any"]  # is parsed when a checkpoint is saved
torch.compiler.set_stance("force_eager")  # pretrain.main compiles; that would only cost time here
config = Config(n_layer=1, n_head=2, n_embd=32, block_size=16, padded_vocab_size=128, rotary_percentage=1.0)
optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2, "weight_decay": 0.0}}
for micro in (4, 1):
    steps.clear()
    train = TrainArgs(global_batch_size=4, micro_batch_size=micro, max_tokens=5 * 4 * 16, max_norm=1.0,
                      lr_warmup_steps=3, min_lr=1e-2)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        pretrain.setup("any", config, Path(folder), precision="32-true", devices=1, logger_name="csv", data=Tokens(),
                       train=train, optimizer=optimizer)  # fmt: skip
    print(f"{4 // micro} micro batches per update, warm-up of 3 updates to 0.01")
    for number, (rate, moved) in enumerate(steps, start=1):
        print(f"  update {number}: learning rate {rate:.5f}, sum of |movement| {moved:.3f}")
