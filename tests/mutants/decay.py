"""Faults of parameter groups and weight decay."""

from tests.mutants.planting import BUILD, DECAYED, GROUPS, SETUP, mutant

FOLLOWS_RATE = """\
set_rate(group, learning_rate(config, update, peak))
        if group.get("weight_decay"):
            first = group.setdefault("first_decay", group["weight_decay"])
            group["weight_decay"] = first * learning_rate(config, update, peak) / (peak or 1)
"""

MUTANTS = [
    mutant(
        "params-not-in-optimizer",
        "DECAY-1",
        "accelerate#3256, #3209",
        (GROUPS, "if parameter.requires_grad:", 'if parameter.requires_grad and name.endswith(("weight", "bias")):'),
    ),
    mutant("frozen-in-optimizer", "DECAY-2", "-", (GROUPS, "if parameter.requires_grad:", "if True:")),
    mutant(
        "frozen-thawed",
        "DECAY-3",
        "litgpt finetune/lora.py",
        (GROUPS, "if parameter.requires_grad:", "if parameter.requires_grad_(True).requires_grad:"),
    ),
    mutant(
        "decay-everything",
        "DECAY-4",
        "lit-llama#254, Fast-LLM#545",
        (BUILD, "groups: Any = decay_groups(model, config.decay, dimensions, chosen) if decays else", "groups: Any ="),
    ),
    mutant(
        "decay-coupled",
        "DECAY-4",
        "joennlae/tensorli#1, pytorch#4429",
        (
            BUILD,
            "optimizer_class(groups, **keywords)",
            "optimizer_class(groups, **keywords); "
            "[group.update(decoupled_weight_decay=False) for group in optimizer.param_groups]",
        ),
    ),
    mutant(
        "decay-tied-ambiguous",
        "DECAY-4",
        "nanoGPT 7c828855",
        (GROUPS, "decayed.get(id(parameter), True) and verdict", "decayed.get(id(parameter), False) or verdict"),
    ),
    mutant(
        "decay-embeddings",
        "DECAY-4",
        "nanoGPT before 7fe4a099",
        (DECAYED, "isinstance(owner, nn.Embedding) or EMBEDDING.search(kind)", "False"),
    ),
    mutant(
        "decay-none",
        "DECAY-4",
        "-",
        (
            GROUPS,
            "[tensor for key, tensor in tensors.items() if decayed[key]]}",
            '[tensor for key, tensor in tensors.items() if decayed[key]], "weight_decay": 0.0}',
        ),
    ),
    mutant(
        "group-without-learning-rate",
        "DECAY-5 EMB-3",
        "accelerate#3209",
        (GROUPS, '"weight_decay": 0.0}', '"weight_decay": 0.0, "lr": 0.0}'),
    ),
    mutant(
        "decay-memory-tokens",
        "DECAY-6",
        "x-transformers#230",
        (DECAYED, " or MEMORY_NAME.match(last)", ""),
    ),
    mutant(
        "decay-name-mismatch",
        "DECAY-6",
        "transformers#16908, #35927, DeepSpeedExamples#755",
        (DECAYED, "NORM.search(kind)", 'kind == "LayerNorm"'),
    ),
    mutant("decay-biases", "DECAY-4", "MEDS_EIC_AR#30", (DECAYED, 'return last != "bias"', "return True")),
    mutant("decay-ndim-off-by-one", "DECAY-7", "-", (GROUPS, "(ndim >= 2 if", "(ndim >= 1 if")),
    mutant(
        "decay-compile-prefix",
        "DECAY-8",
        "pytorch#101107, LLMs-from-scratch#580",
        (
            SETUP,
            "create_optimizer(config, module, ",
            "create_optimizer(config, torch.compile(module) if config.compile else module, ",
        ),
        (
            DECAYED,
            "isinstance(owner, nn.Embedding) or EMBEDDING.search(kind)",
            'name.startswith(("embedding.", "position."))',
        ),
        (GROUPS, "unsharded_name(name)", 'unsharded_name(name).removeprefix("_orig_mod.")'),
    ),
    mutant(
        "decay-follows-the-schedule",
        "DECAY-9",
        "NVIDIA-NeMo/Automodel#3883, dylanyunlon/Neuron_SP#13: decay follows the rate, and is multiplied by it",
        (
            "reference.training.run:Run.update_once",
            "set_rate(group, learning_rate(config, update, peak))",
            FOLLOWS_RATE,
        ),
    ),
    mutant(
        "decay-all-ignored",
        "DECAY-10",
        "unslothai/unsloth#10452: a documented option does nothing",
        ("reference.optimizers.decay:decay_groups", 'decay == "all" or ', ""),
    ),
]
