"""LitGPT: with precision="bf16-true" small updates are lost to rounding, and nothing says so.

bf16-true keeps the weights in bfloat16 (8 significant bits); an update below half a unit in the last place leaves a
weight as it was. Trains 20 updates at a constant rate in bf16-true and in 32-true from one seed, compares how far the
weights moved (norms: the LayerNorm weights, which start at 1), and looks for a message in what is printed or warned.
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
        tokens = torch.randint(128, (64, 17), generator=torch.Generator().manual_seed(1))
        self.train_dataloader = self.val_dataloader = lambda: DataLoader(tokens, batch_size)


def movement(precision: str, lr: float) -> tuple[float, float]:
    seen.clear()
    train = TrainArgs(global_batch_size=2, micro_batch_size=2, max_tokens=640, max_norm=1e9, min_lr=lr)
    train.lr_warmup_steps = 0
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr, "weight_decay": 0.0}}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        pretrain.setup("any", precision=precision, train=train, optimizer=optimizer, out_dir=Path(folder), **run)
    moved = [(after - before).abs().sum().item() for before, after in zip(seen[0], seen[-1])]
    return sum(moved), sum(distance for distance, before in zip(moved, seen[0]) if (before == 1).all())


seen: list[list[torch.Tensor]] = []
said = io.StringIO()
for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook):
    register(lambda optimizer, *_: seen.append([p.detach().double() for p in optimizer.param_groups[0]["params"]]))
config = Config(n_layer=2, n_head=2, n_embd=32, block_size=16, padded_vocab_size=128, rotary_percentage=1.0)
run = {"model_config": config, "data": Tokens(), "devices": 1, "logger_name": "csv"}
torch.compiler.set_stance("force_eager")  # pretrain.main compiles; that would only cost time here
sys.argv = ["litgpt", "pretrain", "any"]  # is parsed when the checkpoint is saved
for lr in (1e-3, 1e-4, 4e-5, 1e-6):
    exact, coarse = movement("32-true", lr), movement("bf16-true", lr)
    print(f"lr {lr:.0e}: bf16-true / 32-true, all weights {coarse[0] / exact[0]:.1%}, norms {coarse[1] / exact[1]:.1%}")
words = ("bf16", "bfloat16", "round", "precision")
lines = {line.strip() for line in said.getvalue().splitlines() if any(word in line for word in words)}
print(f"lines with one of {words}: {sorted(lines)}")
