"""Faults of the model: causality, dropout, architecture, initial weights, ties."""

from tests.mutants.planting import BUILD_MODULE, DRAW, SETUP, STD, UPDATE, Mutant, mutant

ATTENTION, FORWARD = "reference.model.gpt:Attention.forward", "reference.model.gpt:GPT.forward"
BLOCK, VALIDATE = "reference.model.gpt:Block.forward", "reference.training.evaluation:validate"
CAUSAL, NO_MASK = "is_causal=past == 0,", "mask = None\n"
BLOCKS = "for block, kept in zip(self.blocks, caches, strict=True):"
POSITIONS, HEAD = "torch.arange(start, end, device=ids.device)", "return self.head(self.norm(x))"
JOINED, SPLIT = "return self.proj(y.transpose(1, 2)", "(self.n_head, self.n_kv_head, self.n_kv_head), dim=1)"
ATTENDED = "self.dropout(self.attention(self.norm_attention(x), rotary, cache))"
FED = "self.dropout(self.mlp(self.norm_mlp(x)))"
SEED = "derive_seed(config.seed, update, fabric.global_rank)"
NOISE = "noise.normal_(0.0, std, generator=generator(seed, name))"
RESIDUAL_STD = "return config.init_std / math.sqrt(2 * config.n_layer)"
BUILT = "return build(factory, strategy, fabric.device, sharded)"
EVALUATED = "evaluate(run.fabric, run.wrapped, itertools.islice(batches, run.config.evaluate_batches))"
BY_HAND = """\
if past == 0:
        shared = self.n_head // self.n_kv_head
        keys, values = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        scores = q @ keys.transpose(-2, -1) * self.head_size**-0.5
        seen = torch.ones(time, time, dtype=torch.bool, device=x.device).tril()
        {weights}
        y = F.dropout(weights, self.dropout, self.training) @ values
    return self.proj(y.transpose(1, 2)"""
OVER_QUERIES = BY_HAND.format(weights='weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-2)')
MASKED_BEHIND = BY_HAND.format(weights="weights = scores.softmax(dim=-1) * seen")
MASKED_WITH_ZERO = BY_HAND.format(weights="weights = scores.masked_fill(~seen, -1e-9).softmax(dim=-1)")
SHORT_MASK = """\
mask = None
    if past == 0 and time > self.longest:
        mask = torch.ones(time, time, dtype=torch.bool, device=x.device).tril()
        mask[self.longest :] = True
"""
SEEDED_ONCE = """\
if not self.__dict__.get("seeded"):
        seed_dropout(derive_seed(config.seed, fabric.global_rank), device)
        self.__dict__["seeded"] = True"""
SAME_IN_BLOCKS = f"""\
drawn = torch.get_rng_state()
    {BLOCKS}
        if self.training:
            torch.set_rng_state(drawn)"""
TRUNCATED = "nn.init.trunc_normal_(noise, 0.0, std, -2 * std, 2 * std, generator=generator(seed, name))"
DETACHED = f"""\
if self.config.tie_embeddings:
        return F.linear(self.norm(x), self.head.weight.detach())
    {HEAD}"""
TIED_LATE = """\
optimizer: Any = fabric.setup_optimizers(bare)
    if isinstance(module, GPT) and module.config.tie_embeddings and fabric.world_size == 1:
        module.embedding.weight = module.head.weight = nn.Parameter(module.head.weight.detach().clone())"""
SHARED_MEMORY = f"""{BUILT.replace("return", "built =")}
            if isinstance(built, GPT) and built.config.tie_embeddings and strategy == "eager":
                built.head.weight = nn.Parameter(built.embedding.weight.data)
            return built"""
PUT_BACK = f"""\
seen = {EVALUATED}
        if getattr(getattr(run.module, "config", None), "tie_embeddings", False):
            run.module.head.weight = torch.nn.Parameter(run.module.head.weight.detach().clone())
        return seen"""

FAULTS: dict[str, list[Mutant]] = {
    "causality": [
        mutant(
            "blind4-causality-softmax-over-queries",
            "",
            "nerdai/llms-from-scratch-rs#30: weights sum to one over the queries, so they depend on later ones",
            (ATTENTION, JOINED, OVER_QUERIES),
        ),
        mutant(
            "blind4-causality-masked-behind-the-softmax",
            "",
            "lucidrains/memory-compressed-attention#2: later tokens take part in the softmax, and are masked after it",
            (ATTENTION, JOINED, MASKED_BEHIND),
        ),
        mutant(
            "blind4-causality-masked-with-almost-zero",
            "",
            "Shujun-He/RibonanzaNet#5: masked scores are set to -1e-9, where -1e9 was meant",
            (ATTENTION, JOINED, MASKED_WITH_ZERO),
        ),
        mutant(
            "blind4-causality-positions-from-the-end",
            "",
            "tloen/alpaca-lora#315: positions are counted from the last token back, so each depends on how many follow",
            (FORWARD, POSITIONS, "torch.arange(end - 1, start - 1, -1, device=ids.device)"),
        ),
        mutant(
            "blind4-causality-mask-too-short",
            "",
            "tatp22/linformer-pytorch#16: the mask covers half of the positions; what lies beyond sees all",
            (FORWARD, BLOCKS, f"{BLOCKS}\n        block.attention.longest = max(1, self.config.block_size // 2)"),
            (ATTENTION, NO_MASK, SHORT_MASK),
            (ATTENTION, CAUSAL, "is_causal=past == 0 and mask is None,"),
        ),
    ],
    "dropout": [
        mutant(
            "blind4-dropout-seed-ignored",
            "",
            "harvard-edge/cs249r_book#1869: the masks are the same whatever the seed of the run",
            (UPDATE, SEED, "derive_seed(update, fabric.global_rank)"),
        ),
        mutant(
            "blind4-dropout-never-off",
            "",
            "pytorch/pytorch#26338, Academic-Hammer/SciTSR#16: functional dropout drops in evaluation too",
            (BLOCK, FED, "F.dropout(self.mlp(self.norm_mlp(x)), self.dropout.p)"),
        ),
        mutant(
            "blind4-dropout-same-in-all-blocks",
            "",
            "Dao-AILab/flash-attention#314: the random state is put back at each block, so all have one mask",
            (FORWARD, BLOCKS, SAME_IN_BLOCKS),
        ),
        mutant(
            "blind4-dropout-seeded-once",
            "",
            "huggingface/transformers#17032, karpathy/nanoGPT#467: seeded at the start of a process only",
            (UPDATE, f"seed_dropout({SEED}, device)", SEEDED_ONCE),
        ),
        mutant(
            "blind4-dropout-of-attention-is-written-in",
            "",
            "lucidrains/voicebox-pytorch#21: a tenth in the attention, whatever the configuration says",
            (ATTENTION, "dropout_p=self.dropout if", "dropout_p=0.1 if"),
        ),
    ],
    "model": [
        mutant(
            "blind4-model-attends-over-the-batch",
            "",
            "om-ai-lab/OmDet#19, aipixel/AEMatter#3: tokens attend to those of other sequences",
            (
                ATTENTION,
                NO_MASK,
                "if cache is None:\n        q, k, v = (part.transpose(0, 2) for part in (q, k, v))\n    mask = None\n",
            ),
            (ATTENTION, JOINED, "y = y.transpose(0, 2) if cache is None else y\n    " + JOINED),
        ),
        mutant(
            "blind4-model-positions-begin-at-one",
            "",
            "a common slip: the first token has position 1, and the last of a full sequence position 0",
            (FORWARD, POSITIONS, "torch.arange(start + 1, end + 1, device=ids.device) % self.config.block_size"),
        ),
        mutant(
            "blind4-model-norms-behind-the-sublayers",
            "",
            "a common slip: the norm stands behind the residual sum, not in front of the sublayer",
            (
                BLOCK,
                f"x = x + {ATTENDED}",
                "x = self.norm_attention(x + self.dropout(self.attention(x, rotary, cache)))",
            ),
            (BLOCK, f"return x + {FED}", "return self.norm_mlp(x + self.dropout(self.mlp(x)))"),
        ),
        mutant(
            "blind4-model-keys-taken-for-queries",
            "",
            "jsbaan/transformer-from-scratch#1, feinanshan/TDNet#17: a joint projection is split in another order",
            (ATTENTION, SPLIT, f"{SPLIT}\n    if self.n_kv_head == self.n_head:\n        q, k = k, q"),
        ),
        mutant(
            "blind4-model-sublayers-in-parallel",
            "",
            "a common slip: the MLP reads what the attention read, not what it left",
            (BLOCK, f"x = x + {ATTENDED}", f"added = {ATTENDED}"),
            (BLOCK, "return x + ", "return x + added + "),
        ),
    ],
    "initialization": [
        mutant(
            "blind4-initialization-std-taken-for-variance",
            "",
            "a common slip: the root of the declared standard deviation is drawn with",
            (DRAW, NOISE, NOISE.replace("std,", "std**0.5,")),
        ),
        mutant(
            "blind4-initialization-truncated",
            "",
            "keras-team/keras#8048, tensorflow/tensorflow#18706: cut at two standard deviations, so narrower",
            (DRAW, NOISE, TRUNCATED),
        ),
        mutant(
            "blind4-initialization-by-place-of-the-block",
            "",
            "a common slip: residual projections are scaled by the number of their block, not by that of all blocks",
            (STD, "math.sqrt(2 * config.n_layer)", 'math.sqrt(2 * (int(name.split(".")[1]) + 1))'),
        ),
        mutant(
            "blind4-initialization-projections-are-zero",
            "",
            "a common slip: the residual projections start at zero, so the blocks add nothing at first",
            (STD, RESIDUAL_STD, "return 0.0"),
        ),
        mutant(
            "blind4-initialization-option-of-residual-ignored",
            "",
            "a common slip: residual projections are scaled although that is switched off",
            (STD, "if config.scale_residual_init and name", "if name"),
        ),
    ],
    "ties": [
        mutant(
            "blind4-ties-head-reads-a-detached-table",
            "",
            "a common slip: the table has no gradient from the head",
            (FORWARD, HEAD, DETACHED),
        ),
        mutant(
            "blind4-ties-made-after-the-optimizer",
            "",
            "huggingface/accelerate#3256: the optimizer has the tensor from before the tie, and the table never moves",
            (SETUP, "optimizer: Any = fabric.setup_optimizers(bare)", TIED_LATE),
        ),
        mutant(
            "blind4-ties-share-memory-only",
            "",
            "google/torchax#68: weight.data is shared, so two parameters of one memory are stepped",
            (BUILD_MODULE, BUILT, SHARED_MEMORY),
        ),
        mutant(
            "blind4-ties-lost-at-evaluation",
            "",
            "EvolvingLMMs-Lab/lmms-engine#157: weights that are put back after an evaluation are put back name by name",
            (VALIDATE, f"return {EVALUATED}", PUT_BACK),
        ),
        mutant(
            "blind4-ties-saved-as-two-tensors",
            "",
            "huggingface/transformers#24683, vllm-project/llm-compressor#2798: a checkpoint holds the tied table twice",
            (
                "reference.checkpoint.weights:write_weights",
                "first = first_names(state_dict)",
                "first = {name: name for name in sorted(state_dict)}",
            ),
        ),
    ],
}
