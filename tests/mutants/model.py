"""Faults of the function that the model computes: it trains, and is another model."""

from tests.mutants.planting import mutant

ATTENTION, FORWARD, BLOCK = (
    "reference.model.gpt:Attention.forward",
    "reference.model.gpt:GPT.forward",
    "reference.model.gpt:Block.forward",
)
ROTARY, TURN = "reference.model.gpt:Rotary.reset_parameters", "reference.model.gpt:Rotary.forward"

MUTANTS = [
    mutant(
        "gelu-by-erf",
        "MODEL-1",
        "GELU by tanh and by erf, which frameworks call alike",
        ("reference.model.gpt:GeluMLP.forward", 'approximate="tanh"', 'approximate="none"'),
    ),
    mutant(
        "norm-eps-of-its-own",
        "MODEL-1",
        "1e-5 and 1e-6, which Llama's configurations mix up",
        (
            "reference.model.gpt:build_norm",
            "nn.LayerNorm(config.n_embd, eps=config.norm_eps,",
            "nn.LayerNorm(config.n_embd, eps=1e-6,",
        ),
    ),
    mutant(
        "gate-and-up-exchanged",
        "MODEL-1",
        "SwiGLU's matrices by another convention of names",
        (
            "reference.model.gpt:SwigluMLP.forward",
            "F.silu(self.gate(x)) * self.fc(x)",
            "F.silu(self.fc(x)) * self.gate(x)",
        ),
    ),
    mutant(
        "rotary-base-of-its-own",
        "MODEL-1",
        "Llama 3's base of 500000 in a model of the first",
        (ROTARY, "self.theta**-exponent", "500000.0**-exponent"),
    ),
    mutant(
        "rotary-by-pairs",
        "MODEL-1",
        "GPT-J's pairs where GPT-NeoX's halves were declared",
        (
            TURN,
            "first, second = x.chunk(2, dim=-1)",
            "first, second = x[..., ::2], x[..., 1::2]",
        ),
    ),
    mutant(
        "attention-without-scale",
        "MODEL-1",
        "T5 has none, GPT has one",
        (ATTENTION, "is_causal=past == 0,", "is_causal=past == 0, scale=1.0,"),
    ),
    mutant(
        "keys-not-turned",
        "MODEL-1",
        "rotary positions that reach the queries only",
        (ATTENTION, "rotary(q, past), rotary(k, past)", "rotary(q, past), k"),
    ),
    mutant(
        "mlp-beside-attention",
        "MODEL-1",
        "GPT-J's parallel block where a sequential one was declared",
        (
            BLOCK,
            "x = x + self.dropout(self.attention(self.norm_attention(x), rotary, cache))",
            "x, before = x + self.dropout(self.attention(self.norm_attention(x), rotary, cache)), x",
        ),
        (BLOCK, "self.mlp(self.norm_mlp(x))", "self.mlp(self.norm_mlp(before))"),
    ),
    mutant(
        "last-norm-missing",
        "MODEL-1",
        "ln_f left out of a forward that was written again",
        (FORWARD, "return self.head(self.norm(x))", "return self.head(x)"),
    ),
    mutant(
        "tied-head-scaled",
        "MODEL-2",
        "T5 scales by the root of the width where it ties",
        (
            FORWARD,
            "return self.head(self.norm(x))",
            "return self.head(self.norm(x)) * (self.config.n_embd**-0.5 if self.config.tie_embeddings else 1.0)",
        ),
    ),
    mutant(
        "tied-embedding-multiplied",
        "MODEL-2",
        "Gemma multiplies the embedding where it ties",
        (
            FORWARD,
            "x = self.embedding(ids.long())",
            "x = (self.config.n_embd**0.5 if self.config.tie_embeddings else 1.0) * self.embedding(ids.long())",
        ),
    ),
    mutant(
        "shared-heads-tiled",
        "MODEL-3",
        "EricLBuehler/candle-vllm#52, jxiw/M1#4: key/value heads repeated in another order",
        (
            "reference.model.gpt:Attention.forward",
            "mask = None\n",
            "k, v = (part.repeat(1, self.n_head // self.n_kv_head, 1, 1) for part in (k, v))\n    mask = None\n",
        ),
        ("reference.model.gpt:Attention.forward", "enable_gqa=self.n_kv_head != self.n_head,", "enable_gqa=False,"),
    ),
    mutant(
        "rotary-base-of-the-configuration-ignored",
        "MODEL-4",
        "sgl-project/SpecForge#265, vllm-project/vllm#9503: 10000 whatever the configuration says",
        (ROTARY, "self.theta**-exponent", "10000.0**-exponent"),
    ),
    mutant(
        "eps-of-layer-norms-ignored",
        "MODEL-5",
        "NVIDIA-NeMo/Megatron-Bridge#5712: 1e-5 whatever the configuration says",
        ("reference.model.gpt:build_norm", "eps=config.norm_eps, bias", "eps=1e-5, bias"),
    ),
    mutant(
        "eps-of-all-norms-ignored",
        "MODEL-5",
        "huggingface/transformers#38025: eps is not passed on",
        ("reference.model.gpt:build_norm", "eps=config.norm_eps, bias", "eps=1e-5, bias"),
        ("reference.model.gpt:build_norm", "eps=config.norm_eps)", "eps=1e-5)"),
    ),
    mutant(
        "norm-gives-nothing-to-what-is-before-it",
        "MODEL-6",
        "pytorch#148831: a backward that is not that of the forward",
        (BLOCK, "self.mlp(self.norm_mlp(x))", "self.mlp(self.norm_mlp(x.detach()))"),
    ),
    mutant(
        "lookup-counts-double",
        "MODEL-6",
        "scale_grad_by_freq, or a hook on the embedding, that nobody asked for",
        (FORWARD, "x = self.embedding(ids.long())", "x = self.embedding(ids.long())\n    x = 2 * x - x.detach()"),
    ),
]
