"""LitGPT: the optimizer keyword ``fused`` that the user gave is overwritten.

pretrain.main adds fused=True on CUDA and fused=False elsewhere; utils.instantiate_torch_optimizer merges that over the
user's init_args. PyTorch's AdamW runs fused on the CPU too, so fused=True is a valid request there. The first part goes
through pretrain.setup, the second calls instantiate_torch_optimizer with what pretrain.main passes on CUDA.
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
from litgpt.utils import instantiate_torch_optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader


class Tokens(DataModule):
    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.train_dataloader = self.val_dataloader = lambda: DataLoader(torch.randint(128, (8, 17)), batch_size)


def adamw(fused: bool) -> dict:
    return {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "fused": fused}}


stepped = []  # what optimizer.step was called with
register_optimizer_step_pre_hook(lambda optimizer, *_: stepped.append(optimizer.param_groups[0]["fused"]))
config = Config(n_layer=1, n_head=2, n_embd=32, block_size=16, padded_vocab_size=128, rotary_percentage=1.0)
train = TrainArgs(global_batch_size=2, micro_batch_size=2, max_tokens=32, lr_warmup_steps=0, max_norm=1.0)
torch.compiler.set_stance("force_eager")  # pretrain.main compiles; that would only cost time here
sys.argv = ["litgpt", "pretrain", "any"]  # is parsed when the checkpoint is saved
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    run = {"model_config": config, "data": Tokens(), "train": train, "out_dir": Path(folder)}
    pretrain.setup("any", precision="32-true", devices=1, logger_name="csv", optimizer=adamw(fused=True), **run)
print(f"pretrain.setup on the CPU:        user fused=True,  optimizer that steps fused={stepped[0]}")
optimizer = instantiate_torch_optimizer(adamw(fused=False), [torch.nn.Parameter(torch.ones(1))], fused=True)
print(f"what pretrain.main does on CUDA:  user fused=False, optimizer built fused={optimizer.defaults['fused']}")
