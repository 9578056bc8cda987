"""Faults of embeddings: the swap for StableEmbedding, and fine-tuning."""

from tests.mutants.planting import BUILD, PREPARE, SETUP, Mutant, mutant

STABLE, PUT_INTO = "reference.model.embedding:stable_embedding", "reference.checkpoint.folder:put_into"
LOADED, PLAIN = "model.load_state_dict(kept)", "restored.set_submodule(name, plain[id(module)])"
NORMS = ("embedding.norm.weight", "embedding.norm.bias", "position.norm.weight", "position.norm.bias")
HEAD_FOLDED = """
            if isinstance(head := getattr(restored, "head", None), nn.Linear) and head.weight is module.weight:
                head.weight = plain[id(module)].weight
"""

FAULTS: dict[str, list[Mutant]] = {
    "embedding": [
        mutant(
            "blind2-embedding-drawn-anew",
            "",
            "huggingface/transformers#46620: an initialisation overwrites weights that were loaded",
            (
                STABLE,
                "stable.weight = plain.weight",
                "stable.weight = plain.weight\n    torch.nn.init.xavier_uniform_(stable.weight)",
            ),
        ),
        mutant(
            "blind2-embedding-norm-lost-on-resume",
            "",
            "Nerogar/OneTrainer#351: trained embeddings are not those that a resumed run goes on with",
            (
                PUT_INTO,
                LOADED,
                f"model.load_state_dict({{n: own[n] if n.endswith({NORMS}) else t for n, t in kept.items()}})",
            ),
        ),
        mutant(
            "blind2-embedding-export-folds-the-head-too",
            "",
            "vllm-project/llm-compressor#2866: a head that should be untied is not",
            ("reference.model.embedding:restore_embeddings", PLAIN, PLAIN + HEAD_FOLDED),
            (
                "reference.model.embedding:require_equal_logits",
                "if not error <= max(",
                "if False and not error <= max(",
            ),
        ),
        mutant(
            "blind2-embedding-norm-not-fitted",
            "",
            "Lightning-AI/litgpt#1769: a norm in front of trained weights changes their function",
            (PREPARE, "if trained:", "if False:"),
        ),
        mutant(
            "blind2-embedding-table-frozen-by-the-swap",
            "",
            "huggingface/optimum-graphcore#304: an embedding made from given weights is frozen",
            (
                STABLE,
                "return stable.train(plain.training)",
                "stable.weight.requires_grad_(False)\n    return stable.train(plain.training)",
            ),
            (
                BUILD,
                "for module in stable_embeddings(model)]",
                "for module in stable_embeddings(model) if module.weight.requires_grad]",
            ),
        ),
    ],
    "finetuning": [
        mutant(
            "blind2-finetuning-both-matrices-zero",
            "",
            "Lightning-AI/litgpt#193: adapters are not initialised after an empty build, and stay zero",
            ("reference.finetuning.adapters:draw", "parameter.copy_(drawn)", "parameter.zero_()"),
        ),
        mutant(
            "blind2-finetuning-scaled-by-root-of-rank",
            "",
            "NVIDIA/TensorRT-LLM#1668, paiml/aprender#2189: trained and merged by two scales",
            (
                "reference.finetuning.adapters:add_adapters",
                "lora_dropout=config.lora_dropout,",
                "lora_dropout=config.lora_dropout,\n        use_rslora=True,",
            ),
        ),
        mutant(
            "blind2-finetuning-merged-without-scale",
            "",
            "hao-ai-lab/FastVideo#870, cloneofsimo/lora#187: alpha / rank is forgotten in merging",
            ("reference.finetuning.merged:merged_weights", "config.scale * (", "1.0 * ("),
        ),
        mutant(
            "blind2-finetuning-resume-loses-adapters",
            "",
            "huggingface/diffusers#12689: a resumed run goes on with fresh adapters",
            (
                PUT_INTO,
                LOADED,
                'model.load_state_dict({n: own[n] if ".lora_" in n else t for n, t in kept.items()})',
            ),
        ),
        mutant(
            "blind2-finetuning-head-starts-random",
            "",
            "huggingface/transformers#17375, #45079: lm_head.weight is newly initialised",
            (
                SETUP,
                "module.load_state_dict(base.state_dict())",
                'module.load_state_dict({n: t for n, t in base.state_dict().items() if n != "head.weight"},'
                " strict=False)",
            ),
        ),
    ],
}
