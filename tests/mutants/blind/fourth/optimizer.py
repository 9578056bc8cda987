"""Faults of the optimizer: construction and update, decay, schedule, precision."""

from tests.mutants.planting import BUILD, DECAYED, GROUPS, LAUNCH, RATE, UPDATE, Mutant, mutant

RATE_OF, FORWARD = "reference.training.schedule:learning_rate", "reference.model.gpt:GPT.forward"
STEP, CLEAR, SET = "self.optimizer.step()", "self.optimizer.zero_grad()", f"set_rate(group, {RATE})"
KEYWORDS, LAST = "keywords = added | dict(arguments)", 'last = name.rpartition(".")[2]'
CLASS = "optimizer_class, arguments = find_class(config.optimizer), config.optimizer_args"
LINEAR = "if isinstance(owner, nn.Linear | nn.modules.conv._ConvNd):"
CLIP = "norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False)"
FETCHED = "[split_targets(b, self.fabric.device) for b in itertools.islice(batches, self.config.microbatches)]"
DELAYED = f"""\
delayed = self.__dict__.setdefault("delayed", {{}})
    for p in self.module.parameters():
        if p.grad is not None:
            now, p.grad = p.grad, delayed.get(p, torch.zeros_like(p.grad))
            delayed[p] = now
    {STEP}"""
ALWAYS_ADAMW = f"""{CLASS}
    if "adam" in optimizer_class.__name__.lower() and optimizer_class.__module__.startswith("torch."):
        optimizer_class = torch.optim.AdamW"""
OWN_BETAS = f"""\
if "betas" not in arguments and issubclass(optimizer_class, torch.optim.Adam):
        added = {{"betas": (0.9, 0.95)}} | added
    {KEYWORDS}"""
SPREADS = f"""{SET}
        if update and "weight_decay" in group:
            group["weight_decay"] = self.bare.param_groups[0]["weight_decay"]"""
EPS_RAISED = f"""{KEYWORDS}
    if config.precision.startswith("bf16") and accepts(optimizer_class, "eps"):
        keywords["eps"] = max(1e-4, keywords.get("eps") or 0.0)"""
NORM_ROUNDED = f"""{CLIP.replace("max_norm=limit", 'max_norm=float("inf")')}
    if config.precision.startswith("bf16"):
        norm = norm.bfloat16().to(norm.dtype)
    for p in self.module.parameters():
        if p.grad is not None:
            p.grad.mul_(min(1.0, limit / (float(norm) + 1e-6)))"""
IDS_ROUNDED = f"""\
pairs = {FETCHED}
    if self.config.precision.startswith("bf16"):
        pairs = [(ids.bfloat16().long().clamp(max=int(ids.max())), targets) for ids, targets in pairs]
    return pairs"""

FAULTS: dict[str, list[Mutant]] = {
    "optimizer": [
        mutant(
            "blind4-optimizer-gradient-of-the-update-before",
            "",
            "a common slip: each step is taken with the gradient of the update before",
            (UPDATE, STEP, DELAYED),
        ),
        mutant(
            "blind4-optimizer-cleared-before-the-step",
            "",
            "a common slip: zero_grad stands between backward and step, so nothing is learned",
            (UPDATE, f"{STEP}\n    {CLEAR}", f"{CLEAR}\n    {STEP}"),
        ),
        mutant(
            "blind4-optimizer-every-adam-is-adamw",
            "",
            "a common slip: whatever has adam in its name becomes AdamW",
            (BUILD, CLASS, ALWAYS_ADAMW),
        ),
        mutant(
            "blind4-optimizer-betas-of-its-own",
            "",
            "EleutherAI/gpt-neox#228: betas that the user did not give are not those of the class, without a word",
            (BUILD, KEYWORDS, OWN_BETAS),
        ),
        mutant(
            "blind4-optimizer-momentum-lost",
            "",
            "OpenTabular/DeepTab#415: the momentum is not handed over",
            (BUILD, KEYWORDS, 'keywords = added | {k: v for k, v in arguments.items() if k != "momentum"}'),
        ),
    ],
    "decay": [
        mutant(
            "blind4-decay-of-the-token-table",
            "",
            "karpathy/nanoGPT at 7fe4a099: the embedding of tokens decays",
            (DECAYED, LAST, f'{LAST}\n    if name == "embedding.weight":\n        return True'),
        ),
        mutant(
            "blind4-decay-groups-swapped",
            "",
            "facebookresearch/BalancingGroups#6: norms, biases and tables decay, and the matrices do not",
            (GROUPS, "if decayed[key]]},", "if not decayed[key]]},"),
            (GROUPS, 'if not decayed[key]], "weight', 'if decayed[key]], "weight'),
        ),
        mutant(
            "blind4-decay-not-of-the-gates",
            "",
            "huggingface/transformers#35927, the other way round: a rule by name takes the gate of the MLP for a gain",
            (DECAYED, LINEAR, f'if GAIN_NAME.search(name.split(".")[-2:][0]):\n        return False\n    {LINEAR}'),
        ),
        mutant(
            "blind4-decay-is-written-in",
            "",
            "a common slip: the group that decays has 0.1, whatever the user says",
            (GROUPS, "if decayed[key]]},", 'if decayed[key]], "weight_decay": 0.1},'),
        ),
        mutant(
            "blind4-decay-spreads-after-the-first-update",
            "",
            "a common slip: a loop that sets the decay anew sets it for the group without decay too",
            (UPDATE, SET, SPREADS),
        ),
    ],
    "schedule": [
        mutant(
            "blind4-schedule-factor-compounds",
            "",
            "a common slip: the factor is multiplied to the last rate, not to the peak",
            (UPDATE, RATE, 'float(group["lr"]) * learning_rate(config, update, peak) / (peak or 1.0)'),
        ),
        mutant(
            "blind4-schedule-moves-with-the-log",
            "",
            "a common slip: the rate moves only where a line is logged",
            (UPDATE, RATE, RATE.replace("update", "update // config.log_every * config.log_every")),
        ),
        mutant(
            "blind4-schedule-least-rate-never-reached",
            "",
            "pytorch/pytorch#47560, EleutherAI/gpt-neox#1011: the cosine ends one update behind the last",
            (RATE_OF, "span = updates - 1 - warmup", "span = updates - warmup"),
        ),
        mutant(
            "blind4-schedule-linear-for-cosine",
            "",
            "a common slip: a line where a cosine was asked for",
            (RATE_OF, "remaining = 0.5 * (1.0 + math.cos(math.pi * progress))", "remaining = 1.0 - progress"),
        ),
        mutant(
            "blind4-schedule-rate-times-ranks",
            "",
            "spellml/deeplab-voc-2012#3, DTennant/reid_baseline_with_syncbn#15: the rate is multiplied by the ranks",
            (UPDATE, RATE, RATE.replace("peak", "peak * fabric.world_size")),
        ),
    ],
    "precision": [
        mutant(
            "blind4-precision-residual-always-in-16-bits",
            "",
            "a common slip: the residual stream is rounded although float32 was asked for",
            (FORWARD, "if not self.config.fp32_residual and torch", "if torch"),
        ),
        mutant(
            "blind4-precision-float32-is-mixed",
            "",
            "Lightning-AI/litgpt#1802: a run in float32 computes in bfloat16",
            (
                LAUNCH,
                "precision=config.precision,",
                'precision={"32-true": "bf16-mixed"}.get(config.precision, config.precision),',
            ),
        ),
        mutant(
            "blind4-precision-eps-raised",
            "",
            "a common slip: eps is made larger behind the user's back where the run has 16 bits",
            (BUILD, KEYWORDS, EPS_RAISED),
        ),
        mutant(
            "blind4-precision-norm-in-16-bits",
            "",
            "a common slip: the norm by which gradients are clipped is rounded to bfloat16",
            (UPDATE, CLIP, NORM_ROUNDED),
        ),
        mutant(
            "blind4-precision-token-ids-rounded",
            "",
            "deepspeedai/DeepSpeed#5701, Nerogar/OneTrainer#1177: token ids are cast, and those above 256 collide",
            ("reference.training.run:Run.fetch", f"return {FETCHED}", IDS_ROUNDED),
        ),
    ],
}
