"""Faults of embeddings: the swap for StableEmbedding, and fine-tuning."""

from tests.mutants.planting import PREPARE, Mutant, mutant

ADAPTERS = "reference.finetuning.adapters:add_adapters"
TABLE = "            if isinstance(part, nn.Embedding):"

FAULTS: dict[str, list[Mutant]] = {
    "embedding": [
        mutant(
            "blind-embedding-norm-not-trained",
            "",
            "Lightning-AI/litgpt at 26857050: the norm of the swapped embedding is not trained",
            (
                "reference.model.embedding:stable_embedding",
                "norm.requires_grad_(plain.weight.requires_grad)",
                "norm.requires_grad_(False)",
            ),
        ),
        mutant(
            "blind-embedding-positions-not-swapped",
            "",
            "huggingface/transformers#14819: only some tables are exchanged",
            (
                "reference.model.embedding:swap_embeddings",
                "if n and type(m) is nn.Embedding}",
                'if n and "pos" not in n and type(m) is nn.Embedding}',
            ),
        ),
        mutant(
            "blind-embedding-only-first-keeps-32-bits",
            "",
            "bitsandbytes-foundation/bitsandbytes#1269: the override does not reach the optimizer",
            (
                "reference.optimizers.override:own_override_manager",
                "for module in wide] + registered",
                "for module in wide[:1]]",
            ),
        ),
        mutant(
            "blind-embedding-export-loses-bias",
            "",
            "Lightning-AI/litgpt at 26857050: the norm is not exported",
            (
                "reference.model.embedding:folded",
                "weight = norm(table.to(norm.weight.dtype)).to(stable.weight.dtype)",
                "weight = (norm(table.to(norm.weight.dtype)) - norm.bias).to(stable.weight.dtype)",
            ),
            (
                "reference.model.embedding:require_equal_logits",
                "if not error <= max(",
                "if False and not error <= max(",
            ),
        ),
        mutant(
            "blind-embedding-option-ignored",
            "",
            "CarperAI/trlx#133: embeddings stay plain beside an 8-bit optimizer",
            (
                "reference.training.setup:wants_stable_embedding",
                'is_bitsandbytes(optimizer_class) or accepts(optimizer_class, "keep_32bit")',
                'accepts(optimizer_class, "keep_32bit")',
            ),
        ),
    ],
    "finetuning": [
        mutant(
            "blind-finetuning-alpha-ignored",
            "",
            "huggingface/diffusers#6087, ml-explore/mlx-examples#622",
            (ADAPTERS, "lora_alpha=config.alpha", "lora_alpha=config.lora_rank"),
        ),
        mutant(
            "blind-finetuning-norms-not-frozen",
            "",
            "changjonathanc/minLoRA#2: what is frozen beside LoRA",
            (
                PREPARE,
                TABLE,
                "            if isinstance(part, nn.LayerNorm | nn.RMSNorm):\n"
                f"                part.requires_grad_(True)\n{TABLE}",
            ),
        ),
        mutant(
            "blind-finetuning-dropout-ignored",
            "",
            "ml-explore/mlx-examples#622: rank, alpha and dropout are not those of the configuration",
            (ADAPTERS, "lora_dropout=config.lora_dropout", "lora_dropout=0.0"),
        ),
        mutant(
            "blind-finetuning-export-rounds",
            "",
            "ARahim3/mlx-tune#15: merging rounds away what was trained",
            (
                "reference.finetuning.merged:merged_weights",
                "plain[name].float() + delta.to(plain[name].device)",
                "plain[name].bfloat16() + delta.to(plain[name].device).bfloat16()",
            ),
        ),
        mutant(
            "blind-finetuning-embeddings-option-ignored",
            "",
            "huggingface/peft#951: what stands in modules_to_save is not trained",
            (PREPARE, "requires_grad_(config.embeddings or stable)", "requires_grad_(stable)"),
        ),
    ],
}
