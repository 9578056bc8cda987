"""Adapter of TRL's supervised fine-tuning: Recipe -> trl.SFTTrainer.train. Installed by the extra ``trl``.

The data are token ids, with a mask of the tokens to learn; the model is transformers' own.
"""

import importlib.metadata
import pydoc
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from conformance import Checkpoint, Recipe
from conformance.subjects.transformers import TUNING, TransformersPolicy


def build_model(recipe: Recipe) -> nn.Module:
    """Return a GPT-2 or a Llama of transformers, with the weights of the seed."""
    sizes: dict[str, Any] = {"vocab_size": recipe.vocab_size, "max_position_embeddings": recipe.block_size + 1}
    sizes |= {"num_hidden_layers": recipe.n_layer, "num_attention_heads": recipe.n_head}
    sizes |= {"hidden_size": recipe.n_embd, "intermediate_size": 3 * recipe.n_embd}
    sizes |= {"tie_word_embeddings": recipe.tied, "bos_token_id": 0, "eos_token_id": 0}
    sizes |= {"initializer_range": 0.02 if recipe.initial_std is None else recipe.initial_std}
    sizes |= dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), recipe.dropout)
    config = AutoConfig.for_model("gpt2" if recipe.shape == "gpt" else "llama", **sizes)
    dtype = torch.bfloat16 if recipe.precision == "bf16-true" else torch.float32
    set_seed(recipe.seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Return a tokenizer of as many words; SFTTrainer wants one, and uses its id for padding only."""
    words = {f"<{number}>": number for number in range(recipe.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<0>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<0>", pad_token="<0>")


def dataset(ids: list[torch.Tensor], labels: list[torch.Tensor]) -> Dataset:
    """Return rows of token ids, with a mask that is 0 where the target is to be ignored."""
    rows = zip(torch.cat(ids).tolist(), (torch.cat(labels) != -100).int().tolist())
    return Dataset.from_list([{"input_ids": row, "completion_mask": mask} for row, mask in rows])


def all_ranks(recipe: Recipe, part: Any) -> list[torch.Tensor]:
    """Return the microbatches of all ranks, as accelerate hands them out."""
    return [batch for step in zip(*map(part, range(recipe.world_size))) for batch in step]


class Trl:
    """trl.SFTTrainer.train."""

    name, version, policy = "TRL SFTTrainer", importlib.metadata.version("trl"), TransformersPolicy()
    lacks = {
        "batch-total": "gradient_accumulation_steps counts the microbatches",
        "fused": "create_optimizer adds nothing to a class; only the name adamw_torch_fused asks for it",
        "16-mixed": "on the CPU accelerate leaves fp16 off, and does not say so",
        "logits-opt-out": "accelerate's prepare_model always converts what leaves autocast to float32",
        "stable-embedding": "create_optimizer gives nn.Embedding 32-bit state, and swaps nothing",
        "meta-init": "Trainer moves the model with .to(device), which raises for one on the meta device",
        "sharded": "this adapter trains replicas (DDP); Trainer's option fsdp is accelerate's",
        "second-optimizer": "create_optimizer builds one optimizer",
        "chats": "SFTTrainer computes the loss in chunks, where no targets are seen",
        "evaluate-batches": "evaluate() takes all of eval_dataset",
        "residual-opt-out": "the residual stream has the dtype of the embedding, as autocast leaves it",
    }
    lacks |= dict.fromkeys(("foreign-module", "module-factory"), "SFTTrainer takes models of transformers")
    lacks |= dict.fromkeys(("ndim-policy", "decay-all"), "get_decay_parameter_names goes by names and nn.LayerNorm")
    lacks |= dict.fromkeys(("loader", "validation-document"), "SFTTrainer is given samples of token ids")
    elsewhere = "this adapter does not map it; the subject transformers does"
    lacks |= dict.fromkeys(("grouped-query", "rotary-base", "norm-eps", "cooldown", "finds-newest"), elsewhere)
    lacks |= dict.fromkeys(TUNING, "peft_config is not mapped")

    def train(self, recipe: Recipe) -> None:
        optimizer = recipe.optimizer.config()
        every = recipe.updates if recipe.evaluate else recipe.evaluate_every
        arguments = SFTConfig(
            output_dir=str(recipe.directory),
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            logging_steps=1,
            seed=recipe.seed,
            max_steps=recipe.updates,
            warmup_steps=recipe.warmup,
            lr_scheduler_type="constant_with_warmup" if recipe.minimum_lr is None else "cosine_with_min_lr",
            lr_scheduler_kwargs={} if recipe.minimum_lr is None else {"min_lr": recipe.minimum_lr},
            max_grad_norm=recipe.clip or 0.0,
            weight_decay=optimizer["init_args"].get("weight_decay", 0.0),
            bf16=recipe.precision == "bf16-mixed",
            gradient_checkpointing=recipe.activation_checkpointing,
            torch_compile=recipe.compile,
            gradient_accumulation_steps=recipe.microbatches,
            per_device_train_batch_size=recipe.microbatch_size,
            per_device_eval_batch_size=recipe.microbatch_size,
            train_sampling_strategy="sequential" if recipe.samples is None else "random",
            eval_strategy="steps" if every else "no",
            eval_steps=every,
            save_steps=recipe.save_every or 500,
            save_total_limit=recipe.keep_last,
        )
        ids, labels = all_ranks(recipe, recipe.batches), all_ranks(recipe, recipe.labels)
        if recipe.samples is not None:
            ids, labels = [recipe.dataset()], [recipe.dataset_labels()]
        validation = all_ranks(recipe, recipe.validation_batches)
        SFTTrainer(
            model=build_model(recipe),
            args=arguments,
            train_dataset=dataset(ids, labels),
            eval_dataset=dataset(validation, all_ranks(recipe, recipe.validation_labels)),
            processing_class=build_tokenizer(recipe),
            optimizer_cls_and_kwargs=(pydoc.locate(optimizer["class_path"]), optimizer["init_args"]),
        ).train(resume_from_checkpoint=recipe.resume and str(recipe.resume.find("trainer_state.json").parent))

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(checkpoint.find("config.json").parent)
