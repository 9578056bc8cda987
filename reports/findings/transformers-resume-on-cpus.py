"""transformers: several processes on a CPU cannot resume, in releases that load the optimizer onto the device "cpu:0".

Trains one update in one process and saves; then two processes resume from it, started as torchrun starts them.
"""

import os
import subprocess
import sys
import tempfile

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}


def train(folder: str, updates: int, resume: bool) -> None:
    backend = "gloo" if resume else None
    options = TrainingArguments(
        folder, use_cpu=True, max_steps=updates, save_steps=1, ddp_backend=backend, disable_tqdm=True, report_to="none"
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(128, (32, 16))]
    trainer = Trainer(LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=128)), options, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)


if len(sys.argv) > 1:
    train(sys.argv[1], 2, resume=True)
else:
    print(f"transformers {transformers.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        train(folder, 1, resume=False)
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731"}
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, folder],
                env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        for rank, process in enumerate(ranks):
            error = process.communicate()[1].strip().splitlines()[-1:] if process.wait() else ["resumed"]
            print(f"rank {rank}: {' '.join(error)}")
