"""LitGPT 0.4.12 hands `fused` to every optimizer class, also to those that do not know it (litgpt#1743).

pretrain.main builds `extra_kwargs = {"fused": fabric.device.type == "cuda"}` and merges them into the user's
init_args, so the keyword arrives as False on the CPU too. From 0.4.13 on it is filtered by the class's signature.
Run it with litgpt 0.4.12 and with 0.5.13 installed.
"""

import importlib.metadata
import logging

import torch
from litgpt.utils import instantiate_torch_optimizer

logging.disable(logging.CRITICAL)
CLASSES = (
    "torch.optim.AdamW",
    "torch.optim.RMSprop",
    "grokadamw.GrokAdamW",
    "bitsandbytes.optim.AdamW8bit",
    "bitsandbytes.optim.PagedAdamW8bit",
)

print(f"litgpt {importlib.metadata.version('litgpt')}, fused=False as pretrain.main passes it on the CPU")
for class_path in CLASSES:
    config = {"class_path": class_path, "init_args": {"lr": 1e-3}}
    try:
        instantiate_torch_optimizer(config, [torch.nn.Parameter(torch.zeros(4))], fused=False)
        print(f"{class_path:34} built")
    except TypeError as error:
        print(f"{class_path:34} TypeError: {error}")
