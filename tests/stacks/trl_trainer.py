"""TRL's SFTTrainer on a GPT-2 of transformers, with its default loss: the model returns no logits."""

import importlib.metadata
import pydoc
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from conformance import Recipe, everything_but
from conformance.subjects.transformers import TransformersPolicy


class Trl:
    name, version, policy = "TRL SFTTrainer", importlib.metadata.version("trl"), TransformersPolicy()
    claimed = ("gpt-shape", "microbatches", "clip", "schedule", "evaluate")
    lacks = everything_but(*claimed, reason="not mapped")

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        set_seed(recipe.seed)
        optimizer = recipe.optimizer.config()
        sizes = {"vocab_size": recipe.vocab_size, "n_positions": recipe.block_size + 1, "n_embd": recipe.n_embd}
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": recipe.tied}
        model = GPT2LMHeadModel(GPT2Config(n_layer=recipe.n_layer, n_head=recipe.n_head, **sizes, **drops, **ends))
        words = Tokenizer(WordLevel({str(i): i for i in range(recipe.vocab_size)}, unk_token="0"))
        options: dict[str, Any] = {}
        if recipe.minimum_lr is not None:
            options |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": recipe.minimum_lr}}
        if self.fault == "rows are shuffled":
            options["train_sampling_strategy"] = "random"
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **({"lr_scheduler_type": "constant_with_warmup", "train_sampling_strategy": "sequential"} | options),
                output_dir=str(recipe.directory),
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                gradient_checkpointing=False,
                report_to="none",
                logging_steps=1,
                save_strategy="no",
                seed=recipe.seed,
                max_steps=recipe.updates,
                warmup_steps=recipe.warmup,
                max_grad_norm=0.0 if recipe.clip is None or self.fault == "the limit is lost" else recipe.clip,
                weight_decay=optimizer["init_args"].get("weight_decay", 0.0),
                gradient_accumulation_steps=recipe.microbatches,
                per_device_train_batch_size=recipe.microbatch_size,
                per_device_eval_batch_size=recipe.microbatch_size,
                eval_strategy="steps" if recipe.evaluate else "no",
                eval_steps=recipe.updates,
            ),
            train_dataset=dataset(recipe.batches()),
            eval_dataset=dataset(recipe.validation_batches()),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="0"),
            optimizer_cls_and_kwargs=(pydoc.locate(optimizer["class_path"]), optimizer["init_args"]),
        )
        trainer.train()


def dataset(batches: list[torch.Tensor]) -> Any:
    return Dataset.from_list([{"input_ids": row.tolist()} for batch in batches for row in batch])
