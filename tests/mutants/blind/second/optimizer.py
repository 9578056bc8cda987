"""Faults of the optimizer: construction and update, decay, schedule, precision."""

from tests.mutants.planting import BUILD, DECAYED, GROUPS, RATE, RESTORE, UPDATE, Mutant, mutant

RATE_OF, BLOCK = "reference.training.schedule:learning_rate", "reference.model.gpt:Block.forward"
ATTENTION = "reference.model.gpt:Attention.forward"
STEP, SET, KEYWORDS = "self.optimizer.step()", f"set_rate(group, {RATE})", "keywords = added | dict(arguments)"
CONSTANT, SHARE = 'if config.schedule == "constant":', "share = torch.zeros((), device=device)"
STEPS_COUNTED_PER_TENSOR = """
    for entry in self.bare.state.values():
        if "step" in entry:
            entry["step"] += len(self.bare.state) - 1
"""
CORRECTED_IN_PLACE = """
    for group in self.bare.param_groups:
        for entry in (self.bare.state.get(p, {}) for p in group["params"]):
            if torch.is_tensor(entry.get("exp_avg")) and "betas" in group:
                entry["exp_avg"].div_(1 - group["betas"][0] ** float(entry["step"]))
"""
DECAY_KEEPS = """
        if group.get("weight_decay"):
            first = group.setdefault("first_decay", group["weight_decay"])
            group["weight_decay"] = first * peak / (float(group["lr"]) or peak)
"""

FAULTS: dict[str, list[Mutant]] = {
    "optimizer": [
        mutant(
            "blind2-optimizer-step-counts-tensors",
            "",
            "DiffSharp/DiffSharp#292, clab/dynet#77, flashlight/flashlight#143: Adam's t counts each tensor",
            (UPDATE, STEP, STEP + STEPS_COUNTED_PER_TENSOR),
        ),
        mutant(
            "blind2-optimizer-no-decay-group-has-default-betas",
            "",
            "Deci-AI/super-gradients#452: with groups the user's settings do not reach all of them",
            (GROUPS, '"weight_decay": 0.0}', '"weight_decay": 0.0, "betas": (0.9, 0.999)}'),
        ),
        mutant(
            "blind2-optimizer-zero-becomes-the-default",
            "",
            "unslothai/unsloth-zoo#818: an explicit zero is taken for a missing setting",
            (
                BUILD,
                KEYWORDS,
                "keywords = added | {k: v for k, v in arguments.items() if v or isinstance(v, bool)}",
            ),
        ),
        mutant(
            "blind2-optimizer-norm-biases-in-no-group",
            "",
            "huggingface/accelerate#3209, pytorch/pytorch#149205: trainable tensors that no optimizer has",
            (
                GROUPS,
                "if parameter.requires_grad:",
                'if parameter.requires_grad and not ("norm" in name and name.endswith("bias")):',
            ),
        ),
        mutant(
            "blind2-optimizer-bias-correction-in-place",
            "",
            "frgfm/holocron#1: the corrected moment is kept, and corrected again",
            (UPDATE, STEP, STEP + CORRECTED_IN_PLACE),
        ),
    ],
    "decay": [
        mutant(
            "blind2-decay-of-rmsnorm",
            "",
            "huggingface/transformers#16908, #35927: only LayerNorm is known as a norm",
            (
                DECAYED,
                "if NORM.search(kind) or",
                'if kind == "RMSNorm":\n        return True\n    if NORM.search(kind) or',
            ),
        ),
        mutant(
            "blind2-decay-of-qkv-bias",
            "",
            "Modalities/modalities#142: where are the biases filtered out now?",
            (DECAYED, 'return last != "bias"', 'return last != "bias" or "qkv" in name'),
        ),
        mutant(
            "blind2-decay-argument-lost",
            "",
            "gregorbachmann/Next-Token-Failures#5: weight_decay is not handed over",
            (BUILD, KEYWORDS, 'keywords = added | {k: v for k, v in arguments.items() if k != "weight_decay"}'),
        ),
        mutant(
            "blind2-decay-not-scheduled",
            "",
            "tensorflow/addons#844: the decay stays while the rate falls",
            (UPDATE, SET, SET + DECAY_KEEPS),
        ),
        mutant(
            "blind2-decay-of-the-checkpoint-wins",
            "",
            "NVIDIA/Megatron-LM#5212: the state of a checkpoint overrides the decay that is configured",
            (RESTORE, 'if key != "lr" and', 'if key not in ("lr", "weight_decay") and'),
        ),
    ],
    "schedule": [
        mutant(
            "blind2-schedule-constant-skips-warmup",
            "",
            "d8ahazard/sd_dreambooth_extension#557, bmaltais/kohya_ss#2292: constant means without warm-up",
            (RATE_OF, "if update < warmup:", 'if update < warmup and config.schedule != "constant":'),
        ),
        mutant(
            "blind2-schedule-cosine-rises-again",
            "",
            "tracel-ai/burn#5128, Nerogar/OneTrainer#1604: the rate rises after it was least",
            (RATE_OF, "math.cos(math.pi * progress)", "math.cos(2 * math.pi * progress)"),
        ),
        mutant(
            "blind2-schedule-least-rate-zero-is-a-tenth",
            "",
            "unslothai/unsloth-zoo#818: an explicit zero is taken for a missing setting",
            (RATE_OF, "if config.min_lr is None else", "if not config.min_lr else"),
        ),
        mutant(
            "blind2-schedule-least-rate-is-a-floor",
            "",
            "EleutherAI/gpt-neox#1008: max(lr, min_lr), and the cosine does not know min_lr",
            (RATE_OF, "return lowest + (peak - lowest) * remaining", "return max(lowest, peak * remaining)"),
        ),
        mutant(
            "blind2-schedule-peak-never-reached",
            "",
            "Oneflow-Inc/libai#37: after the warm-up the rate stays where the warm-up ended",
            (RATE_OF, CONSTANT, f"peak = peak * warmup / (warmup + 1) if warmup else peak\n    {CONSTANT}"),
        ),
    ],
    "precision": [
        mutant(
            "blind2-precision-norms-see-16-bits",
            "",
            "keras-team/keras#21438, huggingface/transformers#33133: norms in half precision",
            (
                BLOCK,
                "self.norm_mlp(x)",
                "self.norm_mlp(x.bfloat16().to(x.dtype) if torch.is_autocast_enabled(x.device.type) else x)",
            ),
        ),
        mutant(
            "blind2-precision-attention-always-in-16-bits",
            "",
            "Pointcept/Pointcept#352: queries, keys and values are halved for the kernel",
            (
                ATTENTION,
                "mask = None\n",
                "q, k, v = (part.bfloat16() for part in (q, k, v))\n    mask = None\n",
            ),
            (ATTENTION, "y.transpose(1, 2)", "y.to(x.dtype).transpose(1, 2)"),
        ),
        mutant(
            "blind2-precision-rate-rounded",
            "",
            "tinygrad/tinygrad#4297, PaddlePaddle/Paddle#34316: the learning rate is kept in 16 bits",
            (
                UPDATE,
                RATE,
                f'float(torch.tensor({RATE}, dtype=torch.bfloat16 if "bf16" in config.precision else torch.float64))',
            ),
        ),
        mutant(
            "blind2-precision-checkpoint-rounds-weights",
            "",
            "ultralytics/ultralytics#3089: saved in half precision, whatever the run has",
            (
                "reference.checkpoint.weights:write_weights",
                "save_file(tensors,",
                "save_file({n: t.bfloat16().to(t.dtype) if t.is_floating_point() else t for n, t in tensors.items()},",
            ),
        ),
        mutant(
            "blind2-precision-loss-summed-in-16-bits",
            "",
            "pytorch/xla#2425: losses are added up in bfloat16",
            (
                UPDATE,
                SHARE,
                SHARE.replace("device)", 'device, dtype=torch.bfloat16 if "bf16" in config.precision else None)'),
            ),
        ),
    ],
}
