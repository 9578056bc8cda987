"""transformers: the error about a misspelt optimizer keyword does not name the keyword that was meant.

The misspelt keyword is refused, which is right. The message is the class's own TypeError; Python adds "Did you mean"
to it from 3.13 on.
"""

import platform
import tempfile

import torch
from transformers import Trainer, TrainingArguments

keywords = {"lr": 1e-3, "wieght_decay": 0.5}
with tempfile.TemporaryDirectory() as folder:
    options = TrainingArguments(folder, use_cpu=True)
    trainer = Trainer(torch.nn.Linear(2, 2), options, optimizer_cls_and_kwargs=(torch.optim.AdamW, keywords))
    try:
        trainer.create_optimizer()
    except TypeError as error:
        print(f"Python {platform.python_version()}: TypeError: {error}")
        print(f"names weight_decay: {'weight_decay' in str(error)}")
