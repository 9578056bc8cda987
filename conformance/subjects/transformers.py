"""Adapter of Hugging Face's Trainer: Recipe -> transformers.Trainer.train. Installed by the extra ``transformers``."""

import importlib.metadata
import json
import math
import pydoc
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from conformance import Checkpoint, Constant, Normal, NotApplicable, Recipe, TensorInfo

TUNING = ("finetune", "quantised", "lora-dropout", "lora-everywhere", "tuned-embedding")
Samples = torch.utils.data.IterableDataset[dict[str, Tensor]]


class Stream(list[dict[str, Tensor]], Samples):  # type: ignore[misc] # both have __getitem__; the list's is used
    """Samples in order: a stream is the only kind of dataset that no release of transformers 5 shuffles."""


class TransformersPolicy:
    """_init_weights of PreTrainedModel and GPT2PreTrainedModel, Trainer.get_decay_parameter_names, optimization.py."""

    def initial(self, recipe: Recipe, tensor: TensorInfo) -> Constant | Normal:
        if tensor.name.endswith(".bias") or "norm" in tensor.name or "ln_" in tensor.name:
            return Constant(0.0 if tensor.name.endswith(".bias") else 1.0)
        std = 0.02 if recipe.initial_std is None else recipe.initial_std
        return Normal(0.0, std / math.sqrt(2 * recipe.n_layer) if "c_proj" in tensor.name else std)

    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        return tensor.owner != "LayerNorm" and "norm" not in tensor.name and "bias" not in tensor.name

    def learning_rate(self, recipe: Recipe, update: int) -> float:
        peak: float = dict(recipe.optimizer.arguments).get("lr", 1e-3)
        low = 1.0 if recipe.minimum_lr is None else recipe.minimum_lr / peak
        if recipe.cooldown is not None:  # warmup_stable_decay, whose warm-up begins at the lowest rate
            passed = max(0, update - (recipe.updates - recipe.cooldown)) / recipe.cooldown
            share = min(update / max(1, recipe.warmup), 0.5 * (1 + math.cos(math.pi * passed)))
            return peak * (share * (1 - low) + low)
        cosine = 0.5 * (1 + math.cos(math.pi * ((update - recipe.warmup) / max(1, recipe.updates - recipe.warmup))))
        return peak * (update / recipe.warmup if update < recipe.warmup else cosine * (1 - low) + low)


class Transformers:
    """transformers.Trainer.train, with its options as on the command line of transformers' examples."""

    name, version, policy = "transformers Trainer", importlib.metadata.version("transformers"), TransformersPolicy()
    lacks = {
        "batch-total": "gradient_accumulation_steps counts the microbatches",
        "16-mixed": "on the CPU accelerate leaves fp16 off, and does not say so",
        "logits-opt-out": "accelerate's prepare_model always converts what leaves autocast to float32",
        "stable-embedding": "create_optimizer gives nn.Embedding 32-bit state, and swaps nothing",
        "meta-init": "Trainer moves the model with .to(device), which raises for one on the meta device",
        "sharded": "this adapter trains replicas (DDP); Trainer's option fsdp is accelerate's",
        "residual-opt-out": "the residual stream has the dtype of the embedding, as autocast leaves it",
    }
    lacks |= dict.fromkeys(("fused", "second-optimizer"), "create_optimizer makes one, and adds nothing to its class")
    lacks |= dict.fromkeys(("ndim-policy", "decay-all"), "get_decay_parameter_names goes by names and nn.LayerNorm")
    lacks |= dict.fromkeys(("loader", "chats", "validation-document"), "Trainer is given samples of token ids")
    lacks |= dict.fromkeys(TUNING, "transformers-peft has it") | {"evaluate-batches": "evaluate() takes all data"}

    def train(self, recipe: Recipe) -> None:
        if recipe.n_kv_head is not None and recipe.shape == "gpt":
            raise NotApplicable("GPT-2 has as many heads of keys and values as of queries")
        schedule = "constant_with_warmup" if recipe.minimum_lr is None else "cosine_with_min_lr"
        details: dict[str, Any] = {"min_lr": recipe.minimum_lr or 0}
        if recipe.cooldown is not None and recipe.minimum_lr is not None:
            schedule = "warmup_stable_decay"
            details = {"num_decay_steps": recipe.cooldown, "min_lr_ratio": recipe.minimum_lr / recipe.optimizer.rate}
        optimizer, every = recipe.optimizer.config(), recipe.updates if recipe.evaluate else recipe.evaluate_every
        options = f"""--use_cpu --disable_tqdm true --label_names labels --warmup_steps {recipe.warmup}
            --per_device_train_batch_size {recipe.microbatch_size} --per_device_eval_batch_size {recipe.microbatch_size}
            --gradient_accumulation_steps {recipe.microbatches} --eval_strategy {"steps" if every else "no"}
            --max_steps {recipe.updates} --eval_steps {every or 500} --save_steps {recipe.save_every or 500}
            --weight_decay {optimizer["init_args"].get("weight_decay", 0)} --max_grad_norm {recipe.clip or 0}
            --lr_scheduler_type {schedule} --lr_scheduler_kwargs {json.dumps(details, separators=(",", ":"))}
            {f"--save_total_limit {recipe.keep_last}" if recipe.keep_last else ""}
            --bf16 {recipe.precision == "bf16-mixed"} --torch_compile {recipe.compile} --seed {recipe.seed}
            --gradient_checkpointing {recipe.activation_checkpointing} --logging_steps 1 --output_dir""".split()
        sizes: dict[str, Any] = {"vocab_size": recipe.vocab_size, "max_position_embeddings": recipe.block_size + 1}
        sizes |= {"num_hidden_layers": recipe.n_layer, "num_attention_heads": recipe.n_head}
        sizes |= {"hidden_size": recipe.n_embd, "intermediate_size": 3 * recipe.n_embd}
        given: dict[str, Any] = {"num_key_value_heads": recipe.n_kv_head, "initializer_range": recipe.initial_std}
        given |= dict.fromkeys(("layer_norm_epsilon", "rms_norm_eps"), recipe.norm_eps)
        given |= {"rope_parameters": recipe.rotary_base and {"rope_type": "default", "rope_theta": recipe.rotary_base}}
        sizes |= {name: value for name, value in given.items() if value is not None}
        sizes |= {"tie_word_embeddings": recipe.tied, "attention_dropout": recipe.dropout}
        sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), recipe.dropout)
        config = AutoConfig.for_model("gpt2" if recipe.shape == "gpt" else "llama", **sizes)
        dtype = torch.bfloat16 if recipe.precision == "bf16-true" else torch.float32
        foreign: Any = pydoc.locate(recipe.module.replace(":", ".")) if recipe.module else None
        key = "ids" if foreign else "input_ids"  # as the model's forward calls its argument

        def rows(part: Any) -> Any:  # of all ranks, as accelerate hands them out
            return (row for step in zip(*map(part, range(recipe.world_size))) for batch in step for row in batch)

        pairs = zip(rows(recipe.batches), rows(recipe.labels))
        ordered = Stream({key: row, "labels": labels} for row, labels in pairs)
        validation = zip(rows(recipe.validation_batches), rows(recipe.validation_labels))
        samples = zip(recipe.dataset(), recipe.dataset_labels()) if recipe.samples else ()
        folder: Any = recipe.resume and recipe.resume.find("trainer_state.json").parent
        options.append(str(folder.parent if recipe.find_newest else recipe.directory))
        Trainer(
            model_init=lambda: foreign() if foreign else self.model(recipe, config, dtype),
            args=HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(options)[0],
            train_dataset=[{key: row, "labels": labels} for row, labels in samples] or ordered,
            eval_dataset=Stream({key: row, "labels": labels} for row, labels in validation),
            optimizer_cls_and_kwargs=(pydoc.locate(optimizer["class_path"]), optimizer["init_args"]),
            compute_loss_func=foreign and (lambda *args, **count: ForCausalLMLoss(*args, recipe.vocab_size, **count)),
        ).train(resume_from_checkpoint=recipe.find_newest or (folder and str(folder)))

    def model(self, recipe: Recipe, config: Any, dtype: torch.dtype) -> Any:
        """Return the model to train; the subject transformers-peft has another."""
        return AutoModelForCausalLM.from_config(config, dtype=dtype)

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(checkpoint.find("config.json").parent)
