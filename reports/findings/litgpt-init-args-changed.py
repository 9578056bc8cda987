"""LitGPT: the caller's optimizer configuration is changed in place.

utils.instantiate_torch_optimizer copies the dictionary, but not the init_args inside it, and updates those.
pretrain.main passes fused=False on the CPU, as done here. The last lines show a consequence: a user who tries several
optimizers with one set of init_args gets an error from the second, about a keyword that they never wrote.
"""

import torch
from litgpt.utils import instantiate_torch_optimizer

parameters = [torch.nn.Parameter(torch.ones(1))]
shared = {"lr": 1e-3, "weight_decay": 0.1}
print(f"init_args before: {shared}")
instantiate_torch_optimizer({"class_path": "torch.optim.AdamW", "init_args": shared}, parameters, fused=False)
print(f"init_args after:  {shared}")
try:
    instantiate_torch_optimizer({"class_path": "torch.optim.RMSprop", "init_args": shared}, parameters, fused=False)
except TypeError as error:
    print(f"the same init_args with RMSprop: TypeError: {error}")
