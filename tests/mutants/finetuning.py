"""Faults of fine-tuning on frozen and quantised weights."""

from tests.mutants.planting import EVALUATE, GROUPS, PREPARE, mutant

TRAINABLE = "if parameter.requires_grad:"  # in GROUPS
ADAPTERS, DRAW = "reference.finetuning.adapters:add_adapters", "reference.finetuning.adapters:draw"
OVERRIDE, MERGED = "reference.optimizers.override:own_override_manager", "reference.finetuning.merged:merged_weights"
PUT = "reference.checkpoint.folder:put_into"
NORMS_TOO = """\
            if isinstance(part, nn.LayerNorm | nn.RMSNorm):
                part.requires_grad_(True)
            if isinstance(part, nn.Embedding):"""

MUTANTS = [
    mutant("not-quantised", "EMB-9", "-", (PREPARE, 'if config.quantize != "none":', "if False:")),
    mutant(
        "quantised-weights-packed-anew",
        "EMB-9",
        "bitsandbytes 0.50.2 packs them anew in evaluation, on processors with AVX512-BF16",
        (
            EVALUATE,
            "return float(sums[0] / sums[1])",
            "[p.data.bitwise_xor_(1) for p in model.parameters() if not p.is_floating_point()]; "
            "return float(sums[0] / sums[1])",
        ),
    ),
    mutant(
        "adapters-in-no-group",
        "EMB-10",
        "litgpt finetune/lora.py",
        (GROUPS, TRAINABLE, 'if parameter.requires_grad and ".lora_B." not in name:'),
    ),
    mutant(
        "swapped-embedding-in-no-group",
        "EMB-10",
        "litgpt finetune/lora.py",
        (GROUPS, TRAINABLE, 'if parameter.requires_grad and "embedding" not in name:'),
    ),
    mutant(
        "frozen-weights-in-groups",
        "EMB-11",
        "litgpt finetune/lora.py",
        (GROUPS, TRAINABLE, "if parameter.is_floating_point():"),
    ),
    mutant(
        "swap-thaws-a-norm",
        "EMB-12",
        "litgpt finetune/lora.py",
        (
            PREPARE,
            "        swap_embeddings(module)\n",
            "        swap_embeddings(module); module.norm.requires_grad_(True)\n",
        ),
    ),
    mutant(
        "adapter-state-in-32-bits",
        "EMB-13",
        "-",
        (
            OVERRIDE,
            "for module in wide] + registered",
            "for module in [*wide, *(m for n, m in model.named_modules() if n.endswith('_A.default'))]] + registered",
        ),
    ),
    mutant("scales-not-restored", "EMB-14", "-", (PUT, "load_packed(model, saved)", "pass")),
    mutant(
        "adapters-start-as-noise",
        "EMB-15",
        "-",
        (DRAW, 'if f".lora_A.{ADAPTER}." in name:', 'if ".lora_" in name:'),
    ),
    mutant(
        "first-loss-moves-unsaid",
        "EMB-15 EMB-18",
        "litgpt finetune/lora.py",
        ("reference.training.starting:announce", "if not run.changes or not pairs:", "if True:"),
    ),
    mutant("merged-without-scale", "EMB-16", "-", (MERGED, "delta = config.scale * (", "delta = 1.0 * (")),
    mutant(
        "norm-lost-after-tuning",
        "EMB-16",
        "litgpt save_lora_checkpoint",
        (
            "reference.model.embedding:folded",
            "weight = norm(table.to(norm.weight.dtype)).to(stable.weight.dtype)",
            "weight = table.clone()",
        ),
        ("reference.model.embedding:restore_embeddings", "    if plain:\n", "    if False:\n"),
    ),
    mutant(
        "adapters-in-compute-dtype",
        "EMB-17",
        "peft 0.21",
        (ADAPTERS, "parameter.data = parameter.data.to(stored)", "pass"),
    ),
    mutant(
        "norms-trained-beside-adapters",
        "EMB-19",
        "changjonathanc/minLoRA#2: what is frozen beside LoRA",
        (
            "reference.finetuning.prepare:prepare",
            "            if isinstance(part, nn.Embedding):",
            NORMS_TOO,
        ),
    ),
    mutant(
        "adapter-dropout-ignored",
        "EMB-20",
        "ml-explore/mlx-examples#622: rank, alpha and dropout are not those of the configuration",
        ("reference.finetuning.adapters:add_adapters", "lora_dropout=config.lora_dropout", "lora_dropout=0.0"),
    ),
    mutant(
        "embeddings-option-ignored",
        "EMB-21",
        "huggingface/peft#951: what stands in modules_to_save is not trained",
        (
            "reference.finetuning.prepare:prepare",
            "requires_grad_(config.embeddings or stable)",
            "requires_grad_(stable)",
        ),
    ),
    mutant(
        "scaled-by-root-of-rank",
        "EMB-16",
        "NVIDIA/TensorRT-LLM#1668, paiml/aprender#2189: trained and merged by two scales",
        (
            "reference.finetuning.adapters:add_adapters",
            "lora_dropout=config.lora_dropout,",
            "lora_dropout=config.lora_dropout,\n        use_rslora=True,",
        ),
    ),
    mutant(
        "head-starts-random",
        "EMB-15",
        "huggingface/transformers#17375, #45079: lm_head.weight is newly initialised",
        (
            "reference.training.setup:set_up",
            "module.load_state_dict(base.state_dict())",
            'module.load_state_dict({n: t for n, t in base.state_dict().items() if n != "head.weight"}, strict=False)',
        ),
    ),
    mutant(
        "no-adapters-in-the-mlp",
        "EMB-23",
        "unslothai/unsloth-zoo#1150: only some linear layers get adapters, without a word",
        (
            "reference.finetuning.prepare:linear_layers",
            'name.startswith("blocks.")',
            'name.startswith("blocks.") and ".mlp." not in name',
        ),
    ),
]
