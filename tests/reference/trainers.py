"""What the tests of the trainer share: tiny models, and a run of a few updates."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from reference.config import GPTConfig, TrainConfig
from reference.training.trainer import FitResult, Trainer

GPT2 = GPTConfig.gpt2(vocab_size=16, block_size=8, n_layer=1, n_head=2, n_embd=8)
DROPPING = replace(GPT2, dropout=0.1)
SGD: dict[str, Any] = {"optimizer": "torch.optim.SGD", "optimizer_args": {"lr": 1.0}}


class Bigram(nn.Module):  # somebody else's module, which notes in which mode it is called
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 16)
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.modes.append((self.training, self.dropout.training))
        return self.head(self.dropout(self.table(ids)))


def fit(model: Any, train: Any, validation: Any = None, resume: Any = False, **changes: Any) -> FitResult:
    directory, callbacks = changes.pop("directory", "unused"), changes.pop("callbacks", [])
    config = TrainConfig(**{"updates": 1, "accelerator": "cpu", "schedule": "constant", **changes})
    return Trainer(model, config, directory, callbacks).fit(train, validation, resume)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])
