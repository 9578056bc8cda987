"""transformers: all ranks draw the same dropout masks.

Two processes, started as torchrun starts them, train a GPT-2 with dropout, and print which elements of one embedding
each rank keeps.
"""

import os
import subprocess
import sys
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0}


def train(folder: str) -> None:
    options = TrainingArguments(
        folder, use_cpu=True, max_steps=2, save_strategy="no", ddp_backend="gloo", disable_tqdm=True, report_to="none"
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(128, (32, 16))]
    model = GPT2LMHeadModel(GPT2Config(**SIZES, embd_pdrop=0.5))

    def after_dropout(module, inputs, kept) -> None:
        print(f"rank {os.environ['RANK']}: {''.join('.x'[bool(value)] for value in kept[0, 0, :16])}", file=sys.stderr)

    model.transformer.drop.register_forward_hook(after_dropout)
    Trainer(model, options, train_dataset=rows).train()


if len(sys.argv) > 1:
    train(sys.argv[1])
else:
    with tempfile.TemporaryDirectory() as folder:
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29732"}
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, folder],
                env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        for process in ranks:
            print(*(line for line in process.communicate()[1].splitlines() if line.startswith("rank ")), sep="\n")
