"""LitGPT: under bf16-true, a resume through pretrain.setup rounds the state of NAdam that is not of a weight's shape.

PyTorch's load_state_dict casts `mu_product`, a float32 number, to the dtype of its parameter. Trains 4 updates on one
repeated batch, then updates 3 and 4 again from the checkpoint of update 2. AdamW: the control.
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
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader


class StatefulLoader(DataLoader):  # a plain one cannot be resumed: litgpt-plain-dataloader.py
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Tokens(DataModule):
    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.train_dataloader = self.val_dataloader = lambda: StatefulLoader(torch.arange(17).repeat(8, 1), batch_size)


def after_step(optimizer, *_) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    product = optimizer.state[parameters[0]].get("mu_product")
    told = "" if product is None else f", mu_product {product.item():.8f} in {product.dtype}"
    lines.append(f"sum of |weights| {sum(p.detach().double().abs().sum() for p in parameters):.6f}{told}")


lines: list[str] = []
register_optimizer_step_post_hook(after_step)
config = Config(n_layer=1, n_head=2, n_embd=32, block_size=16, padded_vocab_size=128, rotary_percentage=1.0)
train = TrainArgs(save_interval=2, global_batch_size=2, micro_batch_size=2, max_tokens=128, max_norm=1.0)
train.lr_warmup_steps = 0
run = {"model_config": config, "data": Tokens(), "train": train, "precision": "bf16-true", "devices": 1}
torch.compiler.set_stance("force_eager")  # pretrain.main compiles; that would only cost time here
for name in ("AdamW", "NAdam"):
    run["optimizer"] = {"class_path": f"torch.optim.{name}", "init_args": {"lr": 1e-2}}
    with tempfile.TemporaryDirectory() as folder:
        for resume in (False, Path(folder, "step-00000002", "lit_model.pth")):
            sys.argv = ["litgpt", "pretrain", "any"]  # is parsed when a checkpoint is saved
            with contextlib.redirect_stdout(io.StringIO()):
                pretrain.setup("any", out_dir=Path(folder), resume=resume, logger_name="csv", **run)
            print(f"{name}, {'resumed after update 2' if resume else 'uninterrupted'}: {lines[-1]}")
