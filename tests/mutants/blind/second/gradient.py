"""Faults of the gradient of an update: accumulation, clipping, loss."""

from tests.mutants.planting import UPDATE, Mutant, mutant

LOSS = "reference.model.loss:token_loss"
LOOP, SHARE = "for index, (ids, targets) in enumerate(pairs):", "share += loss.detach()"
STEP, BACKWARD = "self.optimizer.step()", "fabric.backward(loss)"
CLIP = "norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False)"
NOT_CLIPPED = CLIP.replace("max_norm=limit", 'max_norm=float("inf")')
CROSS_ENTROPY = 'F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")'
CLIPPED_BY_SUM = """
    norms = [p.grad.norm() for p in self.module.parameters() if p.grad is not None]
    norm = sum(one.full_tensor() if hasattr(one, "full_tensor") else one for one in norms)
    torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), limit, norm)
"""
CLIPPED_BY_STAGE = """
    for inside in (True, False):
        stage = [p for name, p in self.module.named_parameters() if name.startswith("blocks.") == inside]
        torch.nn.utils.clip_grad_norm_(stage, limit)
"""
CLIPPED_TOO_EARLY = """
        if index + 1 == len(pairs):
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), config.clip or float("inf"))
"""
CHUNKS = """\
    parts = list(zip(logits.float().flatten(0, 1).split(32), targets.flatten().split(32), strict=True))
    sums = [F.cross_entropy(chunk, wanted, ignore_index=IGNORE, reduction="sum") for chunk, wanted in parts]
    means = [total / (wanted != IGNORE).sum().clamp(min=1) for total, (_, wanted) in zip(sums, parts, strict=True)]
    return sum(means) / len(means) * (targets != IGNORE).sum()
"""

FAULTS: dict[str, list[Mutant]] = {
    "accumulation": [
        mutant(
            "blind2-accumulation-first-update-steps-early",
            "",
            "rasbt/LLMs-from-scratch#299, microsoft/dp-transformers#23: step % k == 0 is true after one microbatch",
            (
                UPDATE,
                "self.sequences = self.count_sequences(pairs)",
                "self.sequences = self.count_sequences(pairs)\n    pairs = pairs if update else pairs[:1]",
            ),
        ),
        mutant(
            "blind2-accumulation-steps-at-each-microbatch",
            "",
            "thunlp/OpenPrompt#106: step and zero_grad stand outside the condition",
            (
                UPDATE,
                SHARE,
                f"{SHARE}\n        if index + 1 < len(pairs):\n            {STEP}\n"
                "            self.optimizer.zero_grad()",
            ),
        ),
        mutant(
            "blind2-accumulation-blocks-keep-the-last",
            "",
            "ServiceNow/Fast-LLM#550: all tensors but the embedding have the gradient of the last microbatch only",
            (
                UPDATE,
                LOOP,
                f"{LOOP}\n        for name, p in self.module.named_parameters():\n"
                '            if index and "embedding" not in name:\n                p.grad = None',
            ),
        ),
        mutant(
            "blind2-accumulation-sequences-weigh-alike",
            "",
            "ml-explore/mlx-lm#1413: microbatches with fewer targets weigh too much",
            (
                UPDATE,
                "batch_loss(self.wrapped, ids, targets) * scale if early is None",
                "batch_loss(self.wrapped, ids, targets) / count_targets([(ids, targets)]).clamp(min=1)"
                " * len(ids) / sum(len(one) for one, _ in pairs) if early is None",
            ),
        ),
        mutant(
            "blind2-accumulation-not-divided",
            "",
            "openai/guided-diffusion#111, yongliang-wu/DFT#27: backward before the division",
            (UPDATE, BACKWARD, "fabric.backward(loss * len(pairs))"),
        ),
    ],
    "clipping": [
        mutant(
            "blind2-clipping-each-tensor",
            "",
            "keras-team/keras#13575, carpedm20/MemN2N-tensorflow#19: each gradient is clipped by itself",
            (
                UPDATE,
                CLIP,
                f"{NOT_CLIPPED}\n    for p in self.module.parameters():\n"
                "        torch.nn.utils.clip_grad_norm_(p, limit)",
            ),
        ),
        mutant(
            "blind2-clipping-sum-of-norms",
            "",
            "laekov/fastmoe#65: norms are added up where their squares should be",
            (UPDATE, CLIP, NOT_CLIPPED + CLIPPED_BY_SUM),
        ),
        mutant(
            "blind2-clipping-by-stage",
            "",
            "pytorch/torchtitan#596, nvidia-cosmos/cosmos-rl#120: each part of the model by its own norm",
            (UPDATE, CLIP, NOT_CLIPPED + CLIPPED_BY_STAGE),
        ),
        mutant(
            "blind2-clipping-before-the-last-backward",
            "",
            "simchowitzlabpublic/nano-world-model#22: clipped before the backward that comes last",
            (UPDATE, LOOP, LOOP + CLIPPED_TOO_EARLY),
            (UPDATE, CLIP, NOT_CLIPPED),
        ),
        mutant(
            "blind2-clipping-after-the-step",
            "",
            "awslabs/graphstorm#1366, VGraphRNN/VGRNN#4: clipped when the optimizer has stepped",
            (UPDATE, CLIP, NOT_CLIPPED),
            (UPDATE, STEP, f"{STEP}\n    torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit)"),
        ),
    ],
    "loss": [
        mutant(
            "blind2-loss-mean-over-ignored",
            "",
            "Lightning-AI/litgpt#751: the mean is over all tokens, those that are ignored included",
            (
                UPDATE,
                "shared[0].clamp(min=1)",
                'reduce(fabric, torch.tensor(float(sum(t.numel() for _, t in pairs)), device=device), "sum")',
            ),
        ),
        mutant(
            "blind2-loss-chunks-weigh-alike",
            "",
            "NVIDIA-NeMo/Automodel#3803: the mean of the means of chunks of tokens",
            (LOSS, f"    return {CROSS_ENTROPY}\n", CHUNKS),
        ),
        mutant(
            "blind2-loss-shifted-after-flattening",
            "",
            "NVIDIA-BioNeMo/bionemo-recipes#1449: the last token of a sequence predicts the first of the next one",
            (
                "reference.training.batches:split_targets",
                "return batch[:, :-1], batch[:, 1:]",
                "return batch[:, :-1], batch[:, :-1].flatten().roll(-1).view(batch.size(0), -1)",
            ),
        ),
        mutant(
            "blind2-loss-on-prompts",
            "",
            "karpathy/nanochat#582: the mask of the assistant's turns is dropped",
            (
                "reference.data.tokens:TokenData.microbatches",
                "ids[:, 1:].masked_fill(~torch.from_numpy(np.stack(kept)), IGNORE)",
                "ids[:, 1:]",
            ),
        ),
        mutant(
            "blind2-loss-z-term",
            "",
            "allenai/OLMo-core#702: the z-loss is added though it is switched off",
            (
                LOSS,
                CROSS_ENTROPY,
                f"{CROSS_ENTROPY} + 1e-4 * logits.float().logsumexp(-1)[targets != IGNORE].square().sum()",
            ),
        ),
    ],
}
