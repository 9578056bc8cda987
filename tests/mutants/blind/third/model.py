"""Faults of the model: causality, dropout, architecture, initial weights, ties."""

from tests.mutants.planting import DRAW, FIT, PREPARE, RESTORE, STD, UPDATE, Mutant, mutant

ATTENTION, FORWARD = "reference.model.gpt:Attention.forward", "reference.model.gpt:GPT.forward"
BLOCK, TABLES = "reference.model.gpt:Block.forward", "reference.model.gpt:Rotary.reset_parameters"
PUT_INTO, RESET = "reference.checkpoint.folder:put_into", "reference.model.initialization:reset"
CAUSAL, NO_MASK, NOT_CAUSAL = "is_causal=past == 0,", "mask = None\n", "is_causal=False,"
MASK = "mask = None if past else torch.ones(time, time, dtype=torch.bool, device=x.device)"
BLOCKS = "for block, kept in zip(self.blocks, caches, strict=True):"
TURNED = "q, k = rotary(q, past), rotary(k, past)"
BASE, LIMIT, STEP = "    return config.init_std\n", 'limit = config.clip or float("inf")', "self.optimizer.step()"
NOISE = "noise.normal_(0.0, std, generator=generator(seed, name))"
TRAINED, LOADED = "part.weight.requires_grad_(config.embeddings or stable)", "model.load_state_dict(kept)"
WEIGHTS = "checkpoint.load_model(folder, run.module)"
RESTORED = "done = restore(run, folder) if folder is not None else 0"
IN_BLOCKS = """\
place = torch.arange(time, device=x.device) // 4
    mask = None if past else place[:, None] >= place
"""
FIRST_HEAD_SEES_ALL = """\
mask = torch.ones(self.n_head, time, time, dtype=torch.bool, device=x.device).tril() if past == 0 else None
    if mask is not None:
        mask[0] = True
"""
CROSSED = f"""\
{TURNED}
        if self.n_kv_head == self.n_head:
            half = self.head_size // 2
            q, k = (
                torch.cat((one[..., :half], other[..., half:]), dim=-1) for one, other in ((q, k), (k, q))
            )"""
DEFAULT_OF_TORCH = f"""{NOISE} if isinstance(module, nn.Embedding) else noise.uniform_(
            -(noise.size(1) ** -0.5), noise.size(1) ** -0.5, generator=generator(seed, name)
        )"""
SCALED_AGAIN = f"""{WEIGHTS}
        if isinstance(shape := getattr(run.module, "config", None), GPTConfig) and shape.scale_residual_init:
            for name, parameter in run.module.named_parameters():
                if name.endswith((".attention.proj.weight", ".mlp.proj.weight")):
                    parameter.data.div_((2 * shape.n_layer) ** 0.5)"""
TIED = 'getattr(getattr(self.module, "config", None), "tie_embeddings", False)'
HALVED = f"""\
if {TIED} and self.module.embedding.weight.grad is not None:
        self.module.embedding.weight.grad.mul_(0.5)
    {LIMIT}"""
STEPPED_TWICE = f"""\
table = self.module.embedding.weight.data if {TIED} else None
    before = None if table is None else table.clone()
    {STEP}
    if table is not None:
        table.add_(table - before)"""
OWN_HEAD = f"""{TRAINED}
        if config.embeddings and module.head.weight is module.embedding.weight:
            module.head.weight = nn.Parameter(module.head.weight.detach().clone(), requires_grad=False)
            module.config = type(module.config)(**{{**vars(module.config), "tie_embeddings": False}})"""
REBUILT = f"""\
if {{"head.weight", "embedding.weight"}} <= kept.keys():
        kept = {{**kept, "head.weight": kept["embedding.weight"]}}
    {LOADED}"""

FAULTS: dict[str, list[Mutant]] = {
    "causality": [
        mutant(
            "blind3-causality-mask-the-wrong-way-round",
            "",
            "rasbt/LLMs-from-scratch#1061, huggingface/transformers#38094: True is taken for masked, not for seen",
            (ATTENTION, NO_MASK, f"{MASK}.triu()\n"),
            (ATTENTION, CAUSAL, NOT_CAUSAL),
        ),
        mutant(
            "blind3-causality-mask-is-added",
            "",
            "Lightning-AI/litgpt#2235, EleutherAI/gpt-neox#139: 1 and 0 are added to the scores, not 0 and -inf",
            (ATTENTION, NO_MASK, f"{MASK}.tril().to(q.dtype)\n"),
            (ATTENTION, CAUSAL, NOT_CAUSAL),
        ),
        mutant(
            "blind3-causality-mask-in-blocks-of-tokens",
            "",
            "dingo-actual/infini-transformer#4: tokens of one segment see each other",
            (ATTENTION, NO_MASK, IN_BLOCKS),
            (ATTENTION, CAUSAL, NOT_CAUSAL),
        ),
        mutant(
            "blind3-causality-in-the-first-block-only",
            "",
            "karpathy/minGPT#79: later blocks would need no mask",
            (FORWARD, BLOCKS, f"{BLOCKS}\n        block.attention.later = block is not self.blocks[0]"),
            (ATTENTION, CAUSAL, 'is_causal=past == 0 and not getattr(self, "later", False),'),
        ),
        mutant(
            "blind3-causality-one-head-sees-all",
            "",
            "ArrowLuo/CLIP4Clip#22, line/lighthouse#77: heads get a mask that is not theirs",
            (ATTENTION, NO_MASK, FIRST_HEAD_SEES_ALL),
            (ATTENTION, CAUSAL, NOT_CAUSAL),
        ),
    ],
    "dropout": [
        mutant(
            "blind3-dropout-same-on-all-ranks",
            "",
            "mlcommons/training#844: equal seeds on all ranks",
            (UPDATE, "derive_seed(config.seed, update, fabric.global_rank)", "derive_seed(config.seed, update)"),
        ),
        mutant(
            "blind3-dropout-keeps-what-it-should-drop",
            "",
            "titu1994/Inception-v4#5, google-research/electra#61: the probability to keep and the one to drop",
            (
                BLOCK,
                "self.dropout(self.mlp(self.norm_mlp(x)))",
                "F.dropout(self.mlp(self.norm_mlp(x)), 1 - self.dropout.p if self.dropout.p else 0.0, self.training)",
            ),
        ),
        mutant(
            "blind3-dropout-of-attention-in-evaluation",
            "",
            "karpathy/nanoGPT#240, pytorch/pytorch#124464: scaled_dot_product_attention drops in eval mode too",
            (ATTENTION, "dropout_p=self.dropout if self.training else 0.0", "dropout_p=self.dropout"),
        ),
        mutant(
            "blind3-dropout-differs-when-recomputed",
            "",
            "allenai/OLMo-core#828, openai/guided-diffusion#167: a block computed again has another mask",
            (FORWARD, "preserve_rng_state=True", "preserve_rng_state=False"),
        ),
        mutant(
            "blind3-dropout-none-after-resume",
            "",
            "marin-community/levanter#378, XuehaiPan/Soft-Actor-Critic#1: a load leaves the model in eval mode",
            (FIT, RESTORED, f"{RESTORED}\n        if folder is not None:\n            run.module.eval()"),
        ),
    ],
    "model": [
        mutant(
            "blind3-model-rope-theta-ignored",
            "",
            "sgl-project/SpecForge#265, vllm-project/vllm#9503: 10000 whatever the configuration says",
            (TABLES, "self.theta**-exponent", "10000.0**-exponent"),
        ),
        mutant(
            "blind3-model-last-norm-left-out",
            "",
            "NVIDIA-NeMo/Speech#2197, cellarium-ai/cellarium-ml#263: no norm in front of the head",
            (FORWARD, "return self.head(self.norm(x))", "return self.head(x)"),
        ),
        mutant(
            "blind3-model-heads-joined-without-transposing",
            "",
            "jsbaan/transformer-from-scratch#6, chelsea0x3b/dfdx#158: the reshape mixes heads and positions",
            (ATTENTION, "y.transpose(1, 2).reshape(batch, time, width)", "y.reshape(batch, time, width)"),
        ),
        mutant(
            "blind3-model-one-norm-for-both-sublayers",
            "",
            "allenai/OLMo#222, ml-explore/mlx#1636: the MLP gets the norm of the attention",
            (BLOCK, "self.norm_mlp(x)", "self.norm_attention(x)"),
        ),
        mutant(
            "blind3-model-rotary-halves-crossed",
            "",
            "hpcaitech/ColossalAI#6429: half of each turned query is computed from the key",
            (ATTENTION, TURNED, CROSSED),
        ),
    ],
    "initialization": [
        mutant(
            "blind3-initialization-default-of-torch",
            "",
            "ruimalheiro/gradient-garden#62: linear layers keep PyTorch's own initialisation",
            (DRAW, NOISE, DEFAULT_OF_TORCH),
        ),
        mutant(
            "blind3-initialization-head-of-unit-variance",
            "",
            "huggingface/transformers#26441: an untied head is drawn with a standard deviation of 1",
            (STD, BASE, '    return 1.0 if name == "head" else config.init_std\n'),
        ),
        mutant(
            "blind3-initialization-norms-are-drawn",
            "",
            "huggingface/transformers#171: gain and bias of LayerNorm are drawn like any other weight",
            (
                RESET,
                "module.reset_parameters()",
                "module.reset_parameters()\n    if isinstance(module, nn.LayerNorm | nn.RMSNorm):\n"
                "        module.weight.data.normal_(0.0, 0.02)",
            ),
        ),
        mutant(
            "blind3-initialization-all-of-a-block-is-scaled",
            "",
            "facebookresearch/lingua#39: queries, keys, values and gates get the factor of the residual stream too",
            (STD, "name.endswith(RESIDUAL)", 'name.startswith("blocks.")'),
        ),
        mutant(
            "blind3-initialization-scaled-again-on-resume",
            "",
            "huggingface/transformers#45591: weights that were loaded are initialised, as if they were new",
            (RESTORE, WEIGHTS, SCALED_AGAIN),
        ),
    ],
    "ties": [
        mutant(
            "blind3-ties-gradients-averaged",
            "",
            "tag1consulting/feste#6, NVIDIA/Megatron-LM#299: the two gradients of a table are averaged, not added up",
            (UPDATE, LIMIT, HALVED),
        ),
        mutant(
            "blind3-ties-stepped-twice",
            "",
            "paiml/entrenar#314: the table takes a step as the head, and another as the embedding",
            (UPDATE, STEP, STEPPED_TWICE),
        ),
        mutant(
            "blind3-ties-lost-in-finetuning",
            "",
            "unslothai/unsloth#3711, #9331: a trained embedding has a copy of its own, and the head stays as it was",
            (PREPARE, TRAINED, OWN_HEAD),
        ),
        mutant(
            "blind3-ties-table-of-unit-variance",
            "",
            "google-research/t5x#1477, fastai/fastai#2090: the initialisation of an embedding for what is a head too",
            (STD, BASE, '    return 1.0 if config.tie_embeddings and name == "embedding" else config.init_std\n'),
        ),
        mutant(
            "blind3-ties-head-rebuilt-on-resume",
            "",
            "NVIDIA-NeMo/Automodel#2511: a head of its own is loaded as a copy of the embedding",
            (PUT_INTO, LOADED, REBUILT),
        ),
    ],
}
