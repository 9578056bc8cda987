"""TRL: with SFTTrainer, small updates of bfloat16 weights are lost, and a resume loses state of optimizers.

Trains a tiny GPT-2, and prints how far weights move, and where a resumed run ends.
"""

import contextlib
import io
import tempfile

import torch
from datasets import Dataset
from grokadamw import GrokAdamW
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer


def train(kind, lr, dtype, updates, folder, resume=None):
    set_seed(1)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = AutoModelForCausalLM.from_config(GPT2Config(**shape, **drops), dtype=dtype)
    before = [parameter.detach().double() for parameter in model.parameters()]
    words = Tokenizer(WordLevel({str(number): number for number in range(128)}, unk_token="0"))
    usual = {"use_cpu": True, "bf16": False, "report_to": "none", "save_steps": 4, "logging_steps": 1}
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(folder, max_steps=updates, lr_scheduler_type="constant", **usual),
            train_dataset=Dataset.from_list([{"input_ids": row} for row in torch.randint(128, (80, 17)).tolist()]),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="0"),
            optimizer_cls_and_kwargs=(kind, {"lr": lr}),
        )
        trainer.train(resume_from_checkpoint=resume)
    after = [parameter.detach().double() for parameter in model.parameters()]
    return sum((new - old).abs().sum().item() for new, old in zip(after, before, strict=True))


said = io.StringIO()
logging.set_verbosity_warning()
AdamW = torch.optim.AdamW
with tempfile.TemporaryDirectory() as folder:
    for lr in (1e-3, 1e-4, 1e-5):
        exact = train(AdamW, lr, torch.float32, 20, f"{folder}/exact")
        coarse = train(AdamW, lr, torch.bfloat16, 20, f"{folder}/coarse")
        print(f"PREC-6: lr {lr:.0e}: bfloat16 / float32: {coarse / exact:.1%}")
    lines = [line for line in said.getvalue().splitlines() if "bf16" in line or "bfloat16" in line or "round" in line]
    print(f"PREC-6: lines said with 'bf16', 'bfloat16' or 'round': {lines}")
    for clause, kind, dtype in (("OPT-13", AdamW, torch.float32), ("OPT-13", GrokAdamW, torch.float32),
                                ("RESUME-11", torch.optim.NAdam, torch.bfloat16)):  # fmt: skip
        place = f"{folder}/{kind.__name__}"
        whole = train(kind, 1e-2, dtype, 8, place)
        resumed = train(kind, 1e-2, dtype, 8, place, f"{place}/checkpoint-4")
        print(
            f"{clause}: {kind.__name__} {dtype}: weights moved by {whole:.4f}, resumed after update 4 by {resumed:.4f}"
        )
