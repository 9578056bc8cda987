"""LitGPT: the error about a misspelt optimizer keyword does not name the keyword that was meant.

The misspelt keyword is refused, which is right. The message is the class's own TypeError; Python adds "Did you mean"
to it from 3.13 on. LitGPT 0.5.13 supports Python 3.10 to 3.14.
"""

import platform

import torch
from litgpt.utils import instantiate_torch_optimizer

optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "wieght_decay": 0.5}}
try:
    instantiate_torch_optimizer(optimizer, [torch.nn.Parameter(torch.ones(1))], fused=False)
except TypeError as error:
    print(f"Python {platform.python_version()}: TypeError: {error}")
    print(f"names weight_decay: {'weight_decay' in str(error)}")
