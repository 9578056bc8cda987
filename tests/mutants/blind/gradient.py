"""Faults of the gradient of an update: accumulation, clipping, loss."""

from tests.mutants.planting import UPDATE, Mutant, mutant

SPLIT, LOSS = "reference.training.batches:split_targets", "reference.model.loss:token_loss"
CLIP = "norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False)"
NOT_CLIPPED = CLIP.replace("max_norm=limit", 'max_norm=float("inf")')
SHARE = "share += loss.detach()"
ROUNDED = """
        for p in self.module.parameters():
            if p.grad is not None and len(pairs) > 1:
                p.grad.copy_(p.grad.bfloat16())
"""

FAULTS: dict[str, list[Mutant]] = {
    "accumulation": [
        mutant(
            "blind-accumulation-counts-first-microbatch",
            "",
            "keras-team/keras#20241: the last microbatch is taken to be as large as the others",
            (UPDATE, "count_targets(pairs)", "count_targets(pairs[:1]) * len(pairs)"),
        ),
        mutant(
            "blind-accumulation-first-gradient-stays",
            "",
            "huggingface/transformers#29561: gradients that were not cleared are used in the next update",
            (UPDATE, "self.optimizer.zero_grad()", "update > 0 and self.optimizer.zero_grad()"),
        ),
        mutant(
            "blind-accumulation-divided-by-position",
            "",
            "karpathy/nanoGPT#605: loss / (micro_step + 1)",
            (UPDATE, "fabric.backward(loss)", "fabric.backward(loss * (len(pairs) / (index + 1)))"),
        ),
        mutant(
            "blind-accumulation-sum-in-bf16",
            "",
            "deepspeedai/DeepSpeed#2768, linkedin/Liger-Kernel#830",
            (UPDATE, SHARE, SHARE + ROUNDED),
        ),
        mutant(
            "blind-accumulation-short-microbatch-dropped",
            "",
            "tomhosking/torchseq#8, Lightning-AI/pytorch-lightning#4653: the remainder is ignored",
            (
                UPDATE,
                "self.sequences = self.count_sequences(pairs)",
                "self.sequences = self.count_sequences(pairs)\n"
                "    pairs = [pair for pair in pairs if len(pair[0]) == len(pairs[0][0])]",
            ),
        ),
    ],
    "clipping": [
        mutant(
            "blind-clipping-by-value",
            "",
            "neuroailab/tfutils#115, ymcui/Eval-on-NN-of-RC#3: each value is clipped, not the norm",
            (UPDATE, CLIP, NOT_CLIPPED + "\n    torch.nn.utils.clip_grad_value_(self.module.parameters(), limit)"),
        ),
        mutant(
            "blind-clipping-first-group-only",
            "",
            "huggingface/transformers#614: clipped by parameter group",
            (
                UPDATE,
                CLIP,
                NOT_CLIPPED + '\n    torch.nn.utils.clip_grad_norm_(self.bare.param_groups[0]["params"], limit)',
            ),
        ),
        mutant(
            "blind-clipping-none-is-one",
            "",
            "neuroailab/tfutils#115: always clipped to 1.0",
            (UPDATE, 'config.clip or float("inf")', "config.clip or 1.0"),
        ),
        mutant(
            "blind-clipping-limit-per-microbatch",
            "",
            "verl-project/verl#436: the norm of what was not yet divided by the microbatches",
            (UPDATE, "max_norm=limit", "max_norm=limit * len(pairs)"),
        ),
        mutant(
            "blind-clipping-sharded-raises-small-gradients",
            "",
            "pytorch/pytorch#72548: clipping of sharded gradients, written by hand",
            (
                "reference.training.sharding:ShardedStrategy.clip_gradients_norm",
                "(max_norm / (norm + 1e-6)).clamp(max=1.0)",
                '(max_norm / (norm + 1e-6)) if max_norm < float("inf") else torch.ones_like(norm)',
            ),
        ),
    ],
    "loss": [
        mutant(
            "blind-loss-pairs-shifted-twice",
            "",
            "InternLM/InternLM#318: the data set shifts the labels, and so does the model",
            (SPLIT, "return ids, targets", "return ids[:, :-1], targets[:, 1:]"),
        ),
        mutant(
            "blind-loss-smoothed",
            "",
            "pytorch/pytorch#73205: label smoothing that nobody reckons with",
            (LOSS, 'reduction="sum"', 'reduction="sum", label_smoothing=0.01'),
        ),
        mutant(
            "blind-loss-token-zero-ignored",
            "",
            "huggingface/transformers#23530: what looks like padding is masked",
            (
                LOSS,
                "targets.flatten(), ignore_index",
                "targets.flatten().masked_fill(targets.flatten() == 0, IGNORE), ignore_index",
            ),
        ),
        mutant(
            "blind-loss-softcapped",
            "",
            "tdrussell/qlora-pipe#18, the other way round: Gemma's cap of the logits for every model",
            (LOSS, "logits.float().flatten(0, 1)", "(30 * (logits.float() / 30).tanh()).flatten(0, 1)"),
        ),
        mutant(
            "blind-loss-last-position-lost",
            "",
            "hp-l33/AiM#11, lxe/simple-llm-finetuner#53: the last token of a window is cut off once too often",
            (
                SPLIT,
                "return batch[:, :-1], batch[:, 1:]",
                "cut = -1 if batch.size(1) > 2 else None\n        return batch[:, :-1][:, :cut], batch[:, 1:][:, :cut]",
            ),
        ),
    ],
}
