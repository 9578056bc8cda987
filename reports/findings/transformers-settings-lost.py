"""transformers: settings of the optimizer that the Trainer takes and does not use, without a word.

Prints what was given, and what is in the parameter groups of the optimizer that the Trainer builds from it.
"""

import tempfile

import torch
from transformers import Trainer, TrainingArguments


def build(what: str, *keys: str, kind: tuple | None = None, **options: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, use_cpu=True, **options)
        optimizer = Trainer(torch.nn.Linear(2, 2), arguments, optimizer_cls_and_kwargs=kind).create_optimizer()
    found = ", ".join(f"{key}={[group[key] for group in optimizer.param_groups]}" for key in keys)
    print(f"{what:57} {type(optimizer).__name__:9} {found}")


AdamW = torch.optim.AdamW
build("optimizer_cls_and_kwargs=(AdamW, {weight_decay: 0.1})", "weight_decay", kind=(AdamW, {"weight_decay": 0.1}))
build("the same, weight_decay=0.05", "weight_decay", kind=(AdamW, {"weight_decay": 0.1}), weight_decay=0.05)
build("optimizer_cls_and_kwargs=(AdamW, {}), learning_rate=5e-5", "lr", kind=(AdamW, {}), learning_rate=5e-5)
build("optim=grokadamw, adam_beta1=0.8", "betas", optim="grokadamw", adam_beta1=0.8)
build("optim=sgd, optim_args=momentun=0.9", "momentum", optim="sgd", optim_args="momentun=0.9")
build("optim=adamw_torch, optim_args=amsgrad=True", "amsgrad", optim="adamw_torch", optim_args="amsgrad=True")
