"""TRL: what SFTTrainer takes over from transformers' Trainer: first rate, misspelt keyword, NaN, evaluations.

Trains a tiny GPT-2 for five updates, in four ways; a last line says what SFTTrainer itself defines of all this.
"""

import contextlib
import io
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer, TrainerCallback, set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer


class Watch(TrainerCallback):
    def __init__(self, poison):
        self.poison, self.rates, self.lines = poison, [], []

    def on_pre_optimizer_step(self, args, state, control, **keywords):
        self.rates.append(keywords["optimizer"].param_groups[0]["lr"])

    def on_step_begin(self, args, state, control, model=None, **keywords):
        if self.poison and state.global_step == 2:
            model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * torch.nan)

    def on_step_end(self, args, state, control, model=None, **keywords):
        self.lines.append(all(bool(tensor.isfinite().all()) for tensor in model.parameters()))


def train(poison=False, dropout=0.0, kind=torch.optim.AdamW, keywords=None, **options):
    set_seed(1)
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0}
    words = Tokenizer(WordLevel({str(number): number for number in range(128)}, unk_token="0"))
    rows = Dataset.from_list([{"input_ids": row} for row in torch.randint(128, (80, 17)).tolist()])
    watch, said = Watch(poison), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        usual = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 5, "save_strategy": "no"}
        trainer = SFTTrainer(
            model=GPT2LMHeadModel(GPT2Config(**shape, **drops)),
            args=SFTConfig(folder, **usual, **options),
            train_dataset=rows,
            eval_dataset=rows.select(range(8)),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="0"),
            optimizer_cls_and_kwargs=(kind, {"lr": 1e-2} | (keywords or {})),
            callbacks=[watch],
        )
        trainer.train()
    return watch, sum(parameter.sum().item() for parameter in trainer.model.parameters())


logging.set_verbosity_error()
print(f"LR-3: rates {train(warmup_steps=3)[0].rates}")
try:
    train(keywords={"wieght_decay": 0.1})
except TypeError as error:
    print(f"OPT-11: {error}")
print(f"CLIP-3: weights finite after updates 1 to 5, with a NaN in update 3: {train(poison=True)[0].lines}")
sums = [train(dropout=0.1, eval_strategy=strategy, eval_steps=2)[1] for strategy in ("no", "no", "steps")]
print(f"EVAL-7: sum of weights, a run {sums[0]:.6f}, again {sums[1]:.6f}, with evaluations {sums[2]:.6f}")
names = ("create_optimizer", "create_scheduler", "_clip_grad_norm", "_load_optimizer_and_scheduler", "evaluate")
print(
    f"defined anew by SFTTrainer: {[name for name in names if getattr(SFTTrainer, name) is not getattr(Trainer, name)]}"
)
