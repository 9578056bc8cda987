"""Faults of the gradient of an update: accumulation, clipping, loss."""

from tests.mutants.planting import UPDATE, Mutant, mutant

LOSS, SPLIT = "reference.model.loss:token_loss", "reference.training.batches:split_targets"
SCALE, BACKWARD = "scale = fabric.world_size / shared[0].clamp(min=1)", "fabric.backward(loss)"
CLIP = "norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False)"
NOT_CLIPPED = CLIP.replace("max_norm=limit", 'max_norm=float("inf")')
TARGETS, LOGITS = "targets.flatten(), ignore_index", "logits.float().flatten(0, 1)"
RETURNED = f'return F.cross_entropy({LOGITS}, {TARGETS}=IGNORE, reduction="sum")'
COUNT_OF_BEFORE = """\
scale = fabric.world_size / self.__dict__.get("counted", shared[0]).clamp(min=1)
    self.__dict__["counted"] = shared[0].clone()"""
ONE_GROUP_CLEARED = """\
for p in self.bare.param_groups[0]["params"]:
        p.grad = None"""
LAST_LEFT_OUT = f"""\
if len(pairs) == 1 or index + 1 < len(pairs):
                {BACKWARD}"""
CLIPPED_BY_SQUARE = """
    for p in self.module.parameters():
        if p.grad is not None:
            p.grad.mul_(min(1.0, limit / (float(norm) ** 2 + 1e-6)))
"""
IGNORED_PULL = f"""\
right = F.cross_entropy({LOGITS}, {TARGETS}=IGNORE, reduction="sum")
    everything = F.cross_entropy({LOGITS}, targets.flatten().clamp(min=0), reduction="sum")
    return everything - (everything - right).detach()"""

FAULTS: dict[str, list[Mutant]] = {
    "accumulation": [
        mutant(
            "blind3-accumulation-count-of-the-update-before",
            "",
            "huggingface/transformers#35438, #38448: the number of items is that of another batch",
            (UPDATE, SCALE, COUNT_OF_BEFORE),
        ),
        mutant(
            "blind3-accumulation-first-microbatch-again-and-again",
            "",
            "ZhaoJ9014/face.evoLVe#39, KanishJebaMathewM/Truxify#4089: a new iterator each time gives the first batch",
            (UPDATE, "enumerate(pairs)", "enumerate(pairs[:1] * len(pairs))"),
        ),
        mutant(
            "blind3-accumulation-divided-twice",
            "",
            "unslothai/unsloth-zoo#1023, huggingface/transformers#35207: normalised by the count, and by k once more",
            (UPDATE, BACKWARD, "fabric.backward(loss / len(pairs))"),
        ),
        mutant(
            "blind3-accumulation-second-group-never-cleared",
            "",
            "torch/cunn#212: some gradients are not zeroed, and add up over the updates",
            (UPDATE, "self.optimizer.zero_grad()", ONE_GROUP_CLEARED),
        ),
        mutant(
            "blind3-accumulation-last-microbatch-left-out",
            "",
            "mflux-community/mflux#447: the microbatches that end a window make no contribution to the weights",
            (UPDATE, BACKWARD, LAST_LEFT_OUT),
        ),
    ],
    "clipping": [
        mutant(
            "blind3-clipping-by-infinity-norm",
            "",
            "meta-pytorch/torchrec#3199: the infinity norm and the L2 norm take each other's path",
            (UPDATE, CLIP, CLIP.replace("max_norm=limit", 'max_norm=limit, norm_type=float("inf")')),
        ),
        mutant(
            "blind3-clipping-by-squared-norm",
            "",
            "paiml/entrenar#311: the square of the norm is compared with the limit",
            (UPDATE, CLIP, NOT_CLIPPED + CLIPPED_BY_SQUARE),
        ),
        mutant(
            "blind3-clipping-on-rank-0-only",
            "",
            "deepspeedai/DeepSpeed#1801: one rank clips, the others do not",
            (UPDATE, CLIP, CLIP.replace("=limit", '=limit if fabric.global_rank == 0 else float("inf")')),
        ),
        mutant(
            "blind3-clipping-only-measures",
            "",
            "pytorch/torchtitan#1258: the norm exhausts the generator of parameters, and nothing is left to clip",
            (UPDATE, CLIP, NOT_CLIPPED),
        ),
        mutant(
            "blind3-clipping-limit-is-written-in",
            "",
            "flairNLP/flair#3240, PrimeIntellect-ai/prime-rl#190: whatever the limit, a constant is taken",
            (UPDATE, 'config.clip or float("inf")', '1.0 if config.clip else float("inf")'),
        ),
    ],
    "loss": [
        mutant(
            "blind3-loss-ignored-is-token-0",
            "",
            "meta-llama/llama-cookbook#101: the labels of the prompt are 0 in place of -100",
            (LOSS, TARGETS, "targets.flatten().clamp(min=0), ignore_index"),
        ),
        mutant(
            "blind3-loss-targets-not-shifted",
            "",
            "huggingface/transformers#27517, Project-MONAI/GenerativeModels#314: the current token is predicted",
            (SPLIT, "return batch[:, :-1], batch[:, 1:]", "return batch[:, :-1], batch[:, :-1]"),
        ),
        mutant(
            "blind3-loss-softmax-twice",
            "",
            "tflearn/tflearn#562, Lightning-Universe/lightning-bolts#654: softmax in front of the cross entropy",
            (LOSS, LOGITS, "logits.float().softmax(-1).flatten(0, 1)"),
        ),
        mutant(
            "blind3-loss-targets-in-order-of-time",
            "",
            "harvardnlp/namedtensor#66: scores and targets are flattened in different orders",
            (LOSS, TARGETS, "targets.t().flatten(), ignore_index"),
        ),
        mutant(
            "blind3-loss-ignored-targets-have-gradients",
            "",
            "PaddlePaddle/Paddle#28622: the loss leaves out what is ignored, and its gradient does not",
            (LOSS, RETURNED, IGNORED_PULL),
        ),
    ],
}
