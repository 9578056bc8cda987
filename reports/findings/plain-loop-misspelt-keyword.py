"""Plain PyTorch: the error about a misspelt optimizer keyword does not name the keyword that was meant.

A loop that hands its user's keywords to the optimizer's class has no other error than the class's own. It is refused,
which is right. Python itself adds "Did you mean" to it from 3.13 on; this project supports 3.11 and 3.12.
"""

import platform

import torch

settings = {"lr": 1e-3, "wieght_decay": 0.5}
try:
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], **settings)
except TypeError as error:
    print(f"Python {platform.python_version()}: TypeError: {error}")
    print(f"names weight_decay: {'weight_decay' in str(error)}")
