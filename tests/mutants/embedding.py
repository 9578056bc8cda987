"""Faults of StableEmbedding."""

from tests.mutants.planting import BUILD, DECAYED, PREPARE, mutant

STABLE = "reference.model.embedding:stable_embedding"

MUTANTS = [
    mutant(
        "stableemb-redrawn",
        "EMB-1",
        "litgpt#1769",
        (STABLE, "stable.weight = plain.weight\n", "stable.weight = plain.weight; stable.reset_parameters()\n"),
    ),
    mutant(
        "stableemb-rounded",
        "EMB-1",
        "litgpt#1770",
        (
            STABLE,
            "stable.weight = plain.weight\n",
            "stable.weight = nn.Parameter(plain.weight.bfloat16().to(plain.weight.dtype))\n",
        ),
    ),
    mutant(
        "stableemb-drops-padding-idx",
        "EMB-2",
        "litgpt finetune/lora.py",
        (STABLE, "padding_idx=plain.padding_idx,", ""),
    ),
    mutant("stableemb-drops-max-norm", "EMB-2", "litgpt finetune/lora.py", (STABLE, "max_norm=plain.max_norm,", "")),
    mutant(
        "stableemb-drops-sparse",
        "EMB-2",
        "litgpt finetune/lora.py",
        ("reference.model.embedding:swap_embeddings", "if module.sparse:", "if False:"),
        (STABLE, "sparse=plain.sparse,", ""),
    ),
    mutant(
        "stableemb-unfrozen-not-optimised",
        "EMB-3",
        "litgpt finetune/lora.py",
        (PREPARE, "        swap_embeddings(module)\n", "        pass\n"),
        (
            BUILD,
            "own_override_manager(optimizer, model)",
            "__import__('reference').swap_embeddings(model) if 'bitsandbytes' in optimizer_class.__module__ else None",
        ),
    ),
    mutant(
        "bnb-32bit-override-ignored",
        "EMB-4",
        "bitsandbytes#1269",
        (
            "reference.optimizers.override:own_override_manager",
            '[(module, "weight", {"optim_bits": 32}) for module in wide] + registered',
            "[]",
        ),
    ),
    mutant(
        "bnb-override-leaks",
        "EMB-5",
        "bitsandbytes 0.50.2",
        ("reference.optimizers.override:own_override_manager", "if not is_bitsandbytes(optimizer):", "if True:"),
    ),
    mutant(
        "stableemb-unties",
        "EMB-6",
        "facebookresearch/lingua#75",
        (STABLE, "stable.weight = plain.weight\n", "stable.weight = nn.Parameter(plain.weight.detach().clone())\n"),
    ),
    mutant(
        "stableemb-without-bitsandbytes",
        "EMB-7",
        "-",
        (
            "reference.training.setup:wants_stable_embedding",
            "if config.stable_embedding and not useful:",
            "if False:",
        ),
    ),
    mutant(
        "stableemb-not-exported",
        "EMB-8",
        "litgpt save_lora_checkpoint",
        (
            "reference.model.embedding:folded",
            "weight = norm(table.to(norm.weight.dtype)).to(stable.weight.dtype)",
            "weight = table.clone()",
        ),
        ("reference.model.embedding:restore_embeddings", "if plain:", "if False:"),
    ),
    mutant(
        "stableemb-kept-for-inference",
        "EMB-8",
        "-",
        ("reference.model.embedding:restore_embeddings", "if is_stable(module):", "if False:"),
    ),
    mutant(
        "norm-of-swapped-table-frozen",
        "EMB-3",
        "Lightning-AI/litgpt at 26857050: the norm of the swapped embedding is not trained",
        (
            "reference.model.embedding:stable_embedding",
            "norm.requires_grad_(plain.weight.requires_grad)",
            "norm.requires_grad_(False)",
        ),
    ),
    mutant(
        "override-of-the-first-table-only",
        "EMB-4",
        "bitsandbytes-foundation/bitsandbytes#1269: the override does not reach the optimizer",
        (
            "reference.optimizers.override:own_override_manager",
            "for module in wide] + registered",
            "for module in wide[:1]]",
        ),
    ),
    mutant(
        "norm-lost-on-loading",
        "EMB-8",
        "Nerogar/OneTrainer#351: trained embeddings are not those that a resumed run goes on with",
        (
            "reference.checkpoint.folder:put_into",
            "model.load_state_dict(kept)",
            "model.load_state_dict({n: own[n] if n.endswith(('embedding.norm.weight', "
            "'embedding.norm.bias', 'position.norm.weight', 'position.norm.bias')) else t for n, t "
            "in kept.items()})",
        ),
    ),
    mutant(
        "table-frozen-by-the-swap",
        "EMB-3",
        "huggingface/optimum-graphcore#304: an embedding made from given weights is frozen",
        (
            "reference.model.embedding:stable_embedding",
            "return stable.train(plain.training)",
            "stable.weight.requires_grad_(False)\n    return stable.train(plain.training)",
        ),
        (
            "reference.optimizers.build:create_one",
            "for module in stable_embeddings(model)]",
            "for module in stable_embeddings(model) if module.weight.requires_grad]",
        ),
    ),
    mutant(
        "norm-of-a-swapped-table-decays",
        "EMB-22",
        "huggingface/transformers#16908: a norm that the rule for weight decay does not know",
        (
            DECAYED,
            "kind = type(owner).__name__",
            'if name in ("embedding.norm.weight", "position.norm.weight"):\n        return True\n'
            "    kind = type(owner).__name__",
        ),
    ),
]
