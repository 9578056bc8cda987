"""The reference's fine-tuning step at 1.3 billion weights: every weight, or LoRA on weights in 16, 4 or 8 bits.

Each with plain AdamW, with its 8-bit kind, and with StableEmbedding too. One step is what ``Trainer.fit`` does for one
update, in bf16-true and eager: bitsandbytes' layers and peft's are not for one compiled graph. ``python -m
conformance.bench --only 'fine-tuning'`` measures these rows alone.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from conformance.bench.case import FINE_TUNING_STEP, Case, Prepared, Setting
from conformance.bench.models import Updates, common_facts, draw, later_facts, random_batches, shape
from conformance.bench.optimizer_state import describe_groups, optimizer_name, rewind, state_bytes
from conformance.errors import Unavailable
from reference import GPT, ConfigurationError, GPTConfig, TrainConfig
from reference.finetuning import FinetuneConfig

ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.01}
EIGHT_BIT = "bitsandbytes.optim.AdamW8bit"
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW fused": {"optimizer": "torch.optim.AdamW"},
    "AdamW8bit": {"optimizer": EIGHT_BIT},
    "AdamW8bit, StableEmbedding": {"optimizer": EIGHT_BIT, "stable_embedding": True},
}
KINDS = {
    "every weight": FinetuneConfig(),
    "LoRA": FinetuneConfig(lora_rank=16),
    "LoRA on nf4": FinetuneConfig(lora_rank=16, quantize="nf4-dq"),
    "LoRA on int8": FinetuneConfig(lora_rank=16, quantize="int8"),
}
FIRST = "every weight, AdamW fused"  # what all others are interleaved with
UNLIKE = ("flops_per_token", "flops_per_token_causal", "formula")  # frozen weights need no gradient of their own


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Return the rows. On the CPU they are tiny; a quick run has none of them."""
    small = Setting(device, quick).small
    size = "llama-tiny" if small else "llama-1.2b"
    # 64 wide: bitsandbytes 0.50.2 quantises other widths wrongly on the CPU.
    config = replace(shape(size), n_embd=64) if small else shape(size)
    return [
        Case(
            FINE_TUNING_STEP,
            size,
            name,
            partial(prepare, finetune, settings, config),
            beside=None if name == FIRST else FIRST,
            budget=3.0,
            seconds=10.0,
            priority=6,
        )
        for kind, finetune in KINDS.items()
        for optimizer, settings in OPTIMIZERS.items()
        for name in [f"{kind}, {optimizer}"]
        if not quick
    ]


def prepare(finetune: FinetuneConfig, settings: dict[str, Any], config: GPTConfig, setting: Setting) -> Prepared:
    """Build a row, ready to step.

    Raises:
        Unavailable: if peft or bitsandbytes is not to be had here.
    """
    from reference import Trainer

    device, microbatch = setting.device, 2 if setting.small else 16
    common: dict[str, Any] = {"optimizer_args": ADAMW, "schedule": "constant", "logits": "compute"}
    train = TrainConfig(**common, **settings, precision="bf16-true", accelerator=device.type)
    try:
        run = Trainer(partial(draw, config, device), train, finetune=finetune).setup()
    except ConfigurationError as error:
        raise Unavailable(str(error)) from error
    updates = Updates(run, random_batches(config, microbatch, device), config.init_std)
    back = rewind(run.module, run.bare)

    def reset() -> None:
        back()
        updates.begin()

    facts = common_facts(config, microbatch, device, run.module) | {
        "parameters": weights_of(config),  # a packed weight counts fewer
        "trained parameters": sum(p.numel() for p in run.module.parameters() if p.requires_grad),
        "precision": train.precision,
        "optimizer": optimizer_name(run.bare),
        "compiled": "eager",
        "embedding": type(run.module.embedding).__name__,
        "decays": describe_groups(run.bare),
        "host": "reads loss and gradient norm in each step",
    }
    if finetune.lora_rank is not None:
        facts = {name: value for name, value in facts.items() if name not in UNLIKE}

    def later() -> dict[str, float | str]:
        return later_facts(updates.loss, run.bare) | {"state bytes": state_bytes(run.bare)}

    return Prepared(updates.step, facts, reset, inputs=updates.batches, later_facts=later)


def weights_of(config: GPTConfig) -> int:
    """Return the number of weights of a model, each tied one once; built without memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config).parameters())
