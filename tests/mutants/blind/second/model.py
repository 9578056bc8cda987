"""Faults of the model: causality, dropout, architecture, initial weights, ties."""

from tests.mutants.planting import BUILD_MODULE, DRAW, SETUP, STD, UPDATE, Mutant, mutant

ATTENTION, FORWARD = "reference.model.gpt:Attention.forward", "reference.model.gpt:GPT.forward"
BLOCK, ROTARY = "reference.model.gpt:Block.forward", "reference.model.gpt:Rotary.forward"
MATERIALIZE, PUT_INTO = "reference.model.initialization:materialize", "reference.checkpoint.folder:put_into"
CAUSAL, NO_MASK, NOT_CAUSAL = "is_causal=past == 0,", "mask = None\n", "is_causal=False,"
MASK = "mask = None if past else torch.ones(time, time, dtype=torch.bool, device=x.device)"
ATTENDED = "self.dropout(self.attention(self.norm_attention(x), rotary, cache))"
EMBEDDED, HEAD = "x = self.dropout(x)", "return self.head(self.norm(x))"
RECOMPUTED, EMPTY = "x = checkpoint(block, x,", "model.to_empty(device=device)"
BUILT, LOADED = "return build(factory, strategy, fabric.device, sharded)", "model.load_state_dict(kept)"
STEP = "self.optimizer.step()"
CLIP = "norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False)"
COUNTED_TWICE = """
    named = self.module.named_parameters(remove_duplicate=False)
    norm = torch.nn.utils.get_total_norm([p.grad for _, p in named if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), limit, norm)
"""
ONE_SEQUENCE = """\
if past == 0 and self.training:
        q, k, v = (part.transpose(0, 1).reshape(1, part.size(1), batch * time, -1) for part in (q, k, v))
    mask = None
"""
OWN_HEAD = """
    if isinstance(head := getattr(model, "head", None), nn.Linear) and head.weight is model.embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
"""
HEAD_OF_16_BITS = """
    if config.precision == "bf16-true" and isinstance(module, GPT) and module.config.tie_embeddings:
        module.head.weight = nn.Parameter(module.head.weight.detach().clone())
"""
COPY_OF_TABLE = """
            if isinstance(built, GPT) and built.config.tie_embeddings:
                built.head.weight = nn.Parameter(built.embedding.weight.detach().clone())
            return built"""
COPIED = """
    if getattr(getattr(self.module, "config", None), "tie_embeddings", False):
        self.module.head.weight.data.copy_(self.module.embedding.weight.data)
"""

FAULTS: dict[str, list[Mutant]] = {
    "causality": [
        mutant(
            "blind2-causality-one-token-ahead",
            "",
            "RVC-Boss/GPT-SoVITS#965: the diagonal of the mask is off by one",
            (ATTENTION, NO_MASK, f"{MASK}.tril(1)\n"),
            (ATTENTION, CAUSAL, NOT_CAUSAL),
        ),
        mutant(
            "blind2-causality-lost-in-16-bits",
            "",
            "lightseekorg/tokenspeed#469: the kernel for bfloat16 has no causal mask, that for other dtypes has",
            (ATTENTION, CAUSAL, "is_causal=past == 0 and q.dtype != torch.bfloat16,"),
        ),
        mutant(
            "blind2-causality-lost-when-recomputed",
            "",
            "lightly-ai/lightly#2049: the mask is not handed through activation checkpointing",
            (FORWARD, RECOMPUTED, f"block.attention.recomputed = True\n            {RECOMPUTED}"),
            (
                ATTENTION,
                CAUSAL,
                'is_causal=past == 0 and not (self.training and getattr(self, "recomputed", False)),',
            ),
        ),
        mutant(
            "blind2-causality-batch-is-one-sequence",
            "",
            "huggingface/trl#3526, modelscope/ms-swift#4736: sequences laid end to end see those before them",
            (ATTENTION, NO_MASK, ONE_SEQUENCE),
        ),
        mutant(
            "blind2-causality-lost-for-a-single-sequence",
            "",
            "facebookresearch/xformers#104, huggingface/transformers#30311: dropped where there is no padding mask",
            (ATTENTION, CAUSAL, "is_causal=past == 0 and batch > 1,"),
        ),
    ],
    "dropout": [
        mutant(
            "blind2-dropout-same-in-all-updates",
            "",
            "PaddlePaddle/Paddle#7796: always the same random seed",
            (
                UPDATE,
                "derive_seed(config.seed, update, fabric.global_rank)",
                "derive_seed(config.seed, fabric.global_rank)",
            ),
        ),
        mutant(
            "blind2-dropout-twice-after-attention",
            "",
            "EdinburghNLP/nematus#106: applied twice",
            (BLOCK, ATTENDED, f"self.dropout({ATTENDED})"),
        ),
        mutant(
            "blind2-dropout-of-the-residual-stream",
            "",
            "hyunwoongko/transformer#8, soobinseo/Transformer-TTS#11: after the residual is added, not before",
            (BLOCK, f"x + {ATTENDED}", "self.dropout(x + self.attention(self.norm_attention(x), rotary, cache))"),
        ),
        mutant(
            "blind2-dropout-none-after-embedding",
            "",
            "huggingface/pytorch-openai-transformer-lm#49: made and never called",
            (FORWARD, EMBEDDED, "pass"),
        ),
        mutant(
            "blind2-dropout-one-mask-for-all-sequences",
            "",
            "joaopauloschuler/neural-api#6: one mask for the batch, not for each sample",
            (FORWARD, EMBEDDED, "x = x * self.dropout(torch.ones_like(x[:1]))"),
        ),
    ],
    "model": [
        mutant(
            "blind2-model-rotary-pairs-mixed",
            "",
            "raiyanyahya/how-to-train-your-gpt#6, EleutherAI/gpt-neox#834: neighbours are turned by angles of halves",
            (ROTARY, "x.chunk(2, dim=-1)", "(x[..., ::2], x[..., 1::2])"),
            (
                ROTARY,
                "torch.cat((-second, first), dim=-1)",
                "torch.stack((-second, first), dim=-1).flatten(-2)",
            ),
        ),
        mutant(
            "blind2-model-gate-and-up-swapped",
            "",
            "ml-explore/mlx-lm#767: silu(x) * gate instead of silu(gate) * x",
            (
                "reference.model.gpt:SwigluMLP.forward",
                "F.silu(self.gate(x)) * self.fc(x)",
                "F.silu(self.fc(x)) * self.gate(x)",
            ),
        ),
        mutant(
            "blind2-model-residual-behind-the-norm",
            "",
            "facebookresearch/multimodal#305: the layer's input is overwritten before it is added",
            (
                BLOCK,
                f"x = x + {ATTENDED}",
                "x = self.norm_attention(x)\n    x = x + self.dropout(self.attention(x, rotary, cache))",
            ),
        ),
        mutant(
            "blind2-model-far-past-forgotten",
            "",
            "NVIDIA-NeMo/Megatron-Bridge#2656, unslothai/unsloth#8253: a window of another size",
            (ATTENTION, NO_MASK, f"{MASK}.tril().triu(1 - max(1, time // 2))\n"),
            (ATTENTION, CAUSAL, NOT_CAUSAL),
        ),
        mutant(
            "blind2-model-gelu-exact",
            "",
            "NVIDIA-NeMo/Megatron-Bridge#4661, kyutai-labs/pocket-tts#278: the exact GELU for weights of the tanh form",
            ("reference.model.gpt:GeluMLP.forward", 'approximate="tanh"', 'approximate="none"'),
        ),
    ],
    "initialization": [
        mutant(
            "blind2-initialization-root-of-layers",
            "",
            "stanford-crfm/mistral#30, karpathy/minGPT#134: N is taken for the layers, not for what they add",
            (STD, "math.sqrt(2 * config.n_layer)", "math.sqrt(config.n_layer)"),
        ),
        mutant(
            "blind2-initialization-scales-the-wrong-mlp-layer",
            "",
            "karpathy/llama2.c#579: w3 is scaled, not w2, which feeds the residual stream",
            (STD, "name.endswith(RESIDUAL)", 'name.endswith((".attention.proj", ".mlp.fc"))'),
        ),
        mutant(
            "blind2-initialization-seed-ignored",
            "",
            "Nerogar/OneTrainer#1719: a default seed is used whatever the configuration says",
            (DRAW, "generator(seed, name)", "generator(1337, name)"),
        ),
        mutant(
            "blind2-initialization-factory-not-seeded",
            "",
            "ThilinaRajapakse/simpletransformers#1478: the seed does not reach what builds the model",
            (BUILD_MODULE, "fabric.seed_everything(config.seed, verbose=False)", "pass"),
        ),
        mutant(
            "blind2-initialization-meta-norms-are-zero",
            "",
            "mosaicml/llm-foundry#1745, ByteDance-Seed/VeOmni#163: norms are passed over after a build on meta",
            (MATERIALIZE, EMPTY, f"{EMPTY}\n    for parameter in model.parameters():\n        parameter.zero_()"),
            (
                MATERIALIZE,
                "if owns_tensors(module):",
                "if owns_tensors(module) and not isinstance(module, nn.LayerNorm | nn.RMSNorm):",
            ),
        ),
    ],
    "ties": [
        mutant(
            "blind2-ties-lost-on-resume",
            "",
            "huggingface/transformers#11666, NVIDIA-NeMo/Automodel#2571: the head is a tensor of its own after a load",
            (PUT_INTO, LOADED, LOADED + OWN_HEAD),
        ),
        mutant(
            "blind2-ties-lost-in-16-bits",
            "",
            "huggingface/accelerate#993: untied when the weights are moved",
            (
                SETUP,
                "module = build_module(model, config, fabric)",
                "module = build_module(model, config, fabric)" + HEAD_OF_16_BITS,
            ),
        ),
        mutant(
            "blind2-ties-counted-twice-in-the-norm",
            "",
            "NVIDIA-NeMo/RL#3788: a gradient that is there twice is counted twice",
            (UPDATE, CLIP, CLIP.replace("max_norm=limit", 'max_norm=float("inf")') + COUNTED_TWICE),
        ),
        mutant(
            "blind2-ties-logits-scaled",
            "",
            "ml-explore/mlx-examples#591: the scale of T5 where it does not belong",
            (
                FORWARD,
                HEAD,
                "x = self.norm(x)\n"
                "    return self.head(x * self.config.n_embd**-0.5 if self.config.tie_embeddings else x)",
            ),
        ),
        mutant(
            "blind2-ties-copied-after-each-update",
            "",
            "NVIDIA/Megatron-LM#656: two tensors that are made equal, but whose gradients are not added up",
            (BUILD_MODULE, BUILT, BUILT.replace("return", "built =") + COPY_OF_TABLE),
            (UPDATE, STEP, STEP + COPIED),
        ),
    ],
}
