"""LitGPT: a training with a plain PyTorch DataLoader cannot be resumed, nor its checkpoint converted.

pretrain.main puts the DataLoader into the state that it saves. An object without state_dict is pickled whole, and
torch.load, by default weights_only=True since torch 2.6, refuses that file. A loader with state_dict and
load_state_dict, as litdata's StreamingDataLoader has them, works: only its state is saved.
"""

import contextlib
import io
import pickle
import sys
import tempfile
from pathlib import Path

import torch
from litgpt import pretrain
from litgpt.args import TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.scripts.convert_pretrained_checkpoint import convert_pretrained_checkpoint
from torch.utils.data import DataLoader


class StatefulLoader(DataLoader):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Tokens(DataModule):
    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.train_dataloader = self.val_dataloader = lambda: self.loader(torch.randint(128, (8, 17)), batch_size)


def outcome(function, *args, **kwargs) -> str:
    sys.argv = ["litgpt", "pretrain", "any"]  # is parsed when a checkpoint is saved
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            function(*args, **kwargs)
    except pickle.UnpicklingError as error:
        return next(line.strip() for line in str(error).splitlines() if "GLOBAL" in line).split(" by ")[0]
    return "works"


data = Tokens()
config = Config(n_layer=1, n_head=2, n_embd=32, block_size=16, padded_vocab_size=128, rotary_percentage=1.0)
train = TrainArgs(save_interval=2, global_batch_size=2, micro_batch_size=2, max_tokens=128, max_norm=1.0)
run = {"model_config": config, "data": data, "train": train, "precision": "32-true", "devices": 1, "logger_name": "csv"}
torch.compiler.set_stance("force_eager")  # pretrain.main compiles; that would only cost time here
for data.loader in (DataLoader, StatefulLoader):
    with tempfile.TemporaryDirectory() as folder:
        run["out_dir"] = out = Path(folder)
        print(f"{data.loader.__name__}, training:   {outcome(pretrain.setup, 'any', **run)}")
        print(f"{data.loader.__name__}, resume:     {outcome(pretrain.setup, 'any', resume=True, **run)}")
        print(
            f"{data.loader.__name__}, conversion: {outcome(convert_pretrained_checkpoint, out / 'final', out / 'new')}"
        )
