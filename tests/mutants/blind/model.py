"""Faults of the model: causality, dropout, architecture, initial weights, ties."""

from tests.mutants.planting import BUILD_MODULE, DRAW, GROUPS, STD, UPDATE, Mutant, mutant

ATTENTION, FORWARD = "reference.model.gpt:Attention.forward", "reference.model.gpt:GPT.forward"
MATERIALIZE = "reference.model.initialization:materialize"
CAUSAL, GQA = "is_causal=past == 0,", "enable_gqa=self.n_kv_head != self.n_head,"
HEAD, LOOP = "return self.head(self.norm(x))", "for index, (ids, targets) in enumerate(pairs):"
SEEDED = "seed_dropout(derive_seed(config.seed, update, fabric.global_rank), device)"
EMBEDDED, BUILT = "x = self.embedding(ids.long())", "return build(factory, strategy, fabric.device, sharded)"

FAULTS: dict[str, list[Mutant]] = {
    "causality": [
        mutant(
            "blind-causality-lost-with-dropout",
            "",
            "keras-team/keras#23038: the mask is dropped where dropout takes another path",
            (ATTENTION, CAUSAL, "is_causal=past == 0 and not (self.training and self.dropout),"),
        ),
        mutant(
            "blind-causality-lost-at-odd-lengths",
            "",
            "huggingface/transformers#28215, facebookresearch/xformers#66: a mask for another length",
            (ATTENTION, CAUSAL, "is_causal=past == 0 and time % 2 == 0,"),
        ),
        mutant(
            "blind-causality-lost-in-evaluation",
            "",
            "huggingface/transformers#48745: some paths of a decoder are not causal",
            (ATTENTION, CAUSAL, "is_causal=past == 0 and self.training,"),
        ),
        mutant(
            "blind-causality-lost-with-shared-heads",
            "",
            "keras-team/keras#23038: grouped-query attention has the same defect",
            (ATTENTION, CAUSAL, "is_causal=past == 0 and self.n_kv_head == self.n_head,"),
        ),
        mutant(
            "blind-causality-centred-over-time",
            "",
            "facebookresearch/xformers#841: an operation along the wrong dimension",
            (FORWARD, HEAD, "x = self.norm(x)\n    return self.head(x - x.mean(dim=1, keepdim=True))"),
        ),
    ],
    "dropout": [
        mutant(
            "blind-dropout-same-in-all-microbatches",
            "",
            "abr/keras-lmu#29, mlcommons/training#844: the same mask again",
            (UPDATE, LOOP, f"{LOOP}\n        {SEEDED}"),
        ),
        mutant(
            "blind-dropout-children-stay-in-eval",
            "",
            "MILVLG/mcan-vqa#26: train() is not called again after an evaluation",
            (
                "reference.model.modes:evaluation_mode",
                "module.training = training",
                "module.training = training and module is model",
            ),
        ),
        mutant(
            "blind-dropout-none-in-attention",
            "",
            "jadore801120/attention-is-all-you-need-pytorch#40: the setting is not handed over",
            (ATTENTION, "dropout_p=self.dropout if self.training else 0.0", "dropout_p=0.0"),
        ),
        mutant(
            "blind-dropout-none-after-mlp",
            "",
            "lucidrains/reformer-pytorch#55",
            (
                "reference.model.gpt:Block.forward",
                "self.dropout(self.mlp(self.norm_mlp(x)))",
                "self.mlp(self.norm_mlp(x))",
            ),
        ),
        mutant(
            "blind-dropout-not-rescaled",
            "",
            "salesforce/awd-lstm-lm#124: dropout of the input, by hand",
            (FORWARD, "x = self.dropout(x)", "x = self.dropout(x) * (1 - self.config.dropout if self.training else 1)"),
        ),
    ],
    "model": [
        mutant(
            "blind-model-rotary-for-queries-only",
            "",
            "mlfoundations/open_lm#4: rotary positions do not reach queries and keys alike",
            (ATTENTION, "q, k = rotary(q, past), rotary(k, past)", "q = rotary(q, past)"),
        ),
        mutant(
            "blind-model-shared-heads-tiled",
            "",
            "EricLBuehler/candle-vllm#52, jxiw/M1#4: key/value heads repeated in another order",
            (
                ATTENTION,
                "mask = None\n",
                "k, v = (part.repeat(1, self.n_head // self.n_kv_head, 1, 1) for part in (k, v))\n    mask = None\n",
            ),
            (ATTENTION, GQA, "enable_gqa=False,"),
        ),
        mutant(
            "blind-model-eps-of-rmsnorm-ignored",
            "",
            "pytorch/pytorch#157223: RMSNorm without eps takes another one than the layers around it",
            (
                "reference.model.gpt:build_norm",
                "nn.RMSNorm(config.n_embd, eps=config.norm_eps)",
                "nn.RMSNorm(config.n_embd)",
            ),
        ),
        mutant(
            "blind-model-scores-scaled-by-width",
            "",
            "rasbt/LLMs-from-scratch#60: the root of the width of all heads, not of one",
            (ATTENTION, GQA, f"{GQA}\n        scale=width**-0.5,"),
        ),
        mutant(
            "blind-model-last-position-shared",
            "",
            "huggingface/trl#3728: two tokens have the same position",
            (
                FORWARD,
                "torch.arange(start, end, device=ids.device)",
                "torch.arange(start, end, device=ids.device).clamp(max=max(0, self.config.block_size - 2))",
            ),
        ),
    ],
    "initialization": [
        mutant(
            "blind-initialization-mlp-not-scaled",
            "",
            "Lightning-AI/litgpt at 26857050: GptNeoxMLP.proj keeps the base std",
            (STD, "name.endswith(RESIDUAL)", "name.endswith(RESIDUAL[0])"),
        ),
        mutant(
            "blind-initialization-tables-ignore-std",
            "",
            "huggingface/transformers#39772: 0.02 written into the initialisation of embeddings",
            (
                STD,
                "    return config.init_std\n",
                '    return 0.02 if name in ("embedding", "position") else config.init_std\n',
            ),
        ),
        mutant(
            "blind-initialization-equal-layers",
            "",
            "netket/netket#241: the same seed for all layers",
            (DRAW, "generator(seed, name)", "generator(seed, str(tuple(module.weight.shape)))"),
        ),
        mutant(
            "blind-initialization-meta-loses-rotary",
            "",
            "jingyaogong/minimind#855: tables of rotary positions after a build on the meta device",
            (
                MATERIALIZE,
                "model.to_empty(device=device)",
                "model.to_empty(device=device)\n    for buffer in model.buffers():\n        buffer.zero_()",
            ),
            (MATERIALIZE, "if owns_tensors(module):", 'if owns_tensors(module) and not hasattr(module, "theta"):'),
        ),
        mutant(
            "blind-initialization-biases-not-zero",
            "",
            "open-mmlab/mmsegmentation#1069: the wrong initialisation for weight and bias together",
            (DRAW, "bias.zero_()", "bias.fill_(std)"),
        ),
    ],
    "ties": [
        mutant(
            "blind-ties-lost-on-meta",
            "",
            "NVIDIA-NeMo/Automodel#2213, verl-project/verl#7834",
            (MATERIALIZE, "setattr(model.get_submodule(owner), attribute, tensor)", "pass"),
            (
                "reference.model.initialization:tie",
                "module.weight = model.get_submodule(owner).weight",
                "module.weight.data.copy_(model.get_submodule(owner).weight.data)",
            ),
        ),
        mutant(
            "blind-ties-gradient-of-the-head-only",
            "",
            "paiml/entrenar#314: the gradients of a tied tensor are not added up",
            (
                FORWARD,
                EMBEDDED,
                f"{EMBEDDED}\n    if self.config.tie_embeddings:\n        x = x.detach()",
            ),
        ),
        mutant(
            "blind-ties-cannot-be-switched-off",
            "",
            "mosaicml/llm-foundry#728: tie_word_embeddings=False does nothing",
            (
                BUILD_MODULE,
                BUILT,
                BUILT.replace("return", "built =")
                + "\n            if isinstance(built, GPT):\n                built.head.weight = built.embedding.weight"
                + "\n            return built",
            ),
        ),
        mutant(
            "blind-ties-lost-in-the-swap",
            "",
            "facebookresearch/lingua#75: two parameters of one table",
            (
                "reference.model.embedding:stable_embedding",
                "stable.weight = plain.weight",
                "stable.weight.requires_grad_(plain.weight.requires_grad)",
            ),
        ),
        mutant(
            "blind-ties-decay-by-the-last-name",
            "",
            "karpathy/nanoGPT at 7c828855: lm_head.weight in the set that decays",
            (GROUPS, "decayed.get(id(parameter), True) and verdict", "verdict"),
        ),
    ],
}
