"""Pretrain a tiny Pythia with LitGPT's pretrain.setup on a synthetic corpus, as `litgpt pretrain pythia-14m` does."""

import sys
from pathlib import Path

import torch
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from torch.utils.data import DataLoader

VOCAB, LENGTH = 96, 24


def rows(count, seed):
    g = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 6, (count, LENGTH + 1), generator=g)
    return (steps.cumsum(1) + torch.randint(VOCAB, (count, 1), generator=g)) % VOCAB


class Synthetic(DataModule):
    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(rows(128, 1), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(rows(16, 2), batch_size=self.batch_size)


sys.argv = ["litgpt", "pretrain", "pythia-14m"]  # pretrain.setup parses it when it saves
torch.compiler.set_stance("force_eager")  # pretrain.main compiles always, which takes a minute
config = Config.from_name(
    "pythia-14m", n_layer=2, n_head=2, n_embd=32, intermediate_size=96, block_size=LENGTH, padded_vocab_size=VOCAB
)
pretrain.setup(
    "pythia-14m", config, Path("out"), precision="32-true", devices=1, logger_name="csv", data=Synthetic(),
    train=TrainArgs(
        global_batch_size=8, micro_batch_size=4, max_tokens=8 * 8 * LENGTH, max_norm=1.0, lr_warmup_steps=2,
        min_lr=1e-4, log_interval=1, save_interval=100,
    ),
    eval=EvalArgs(interval=4, max_iters=2, initial_validation=False),
    optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}},
)
