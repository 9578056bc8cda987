"""Faults of initial weights."""

from tests.mutants.planting import BUILD_MODULE, DRAW, LOAD, PEAKS, PUT, SETUP, STD, mutant

INITIALIZE = "reference.model.initialization:initialize"

MUTANTS = [
    mutant(
        "init-empty-memory-single-device",
        "INIT-1",
        "litgpt#689, #759, #1150",
        (BUILD_MODULE, "empty_init=False", "empty_init=True"),
        ("reference.model.initialization:reset", "module.reset_parameters()", "pass"),
    ),
    mutant(
        "init-skipped-fresh-run",
        "INIT-2",
        "litgpt#1150",
        ("reference.model.initialization:reset", "module.reset_parameters()", "pass"),
    ),
    mutant(
        "init-residual-scale-never-applied",
        "INIT-2",
        "transformers#47458",
        (STD, "name.endswith(RESIDUAL)", "name in RESIDUAL"),
    ),
    mutant(
        "init-residual-scale-class-gate",
        "INIT-2",
        "litgpt initialize_weights, GptNeoxMLP",
        (STD, "name.endswith(RESIDUAL)", 'name.endswith(".attention.proj")'),
    ),
    mutant(
        "init-residual-scale-fixed-depth",
        "INIT-2",
        "stanford-crfm/mistral#30",
        (STD, "math.sqrt(2 * config.n_layer)", "math.sqrt(2 * 2)"),
    ),
    mutant(
        "init-uniform-instead-of-normal",
        "INIT-2",
        "PyTorch's default init where another was declared",
        (DRAW, "noise.normal_(0.0, std, ", "noise.uniform_(-std * 3**0.5, std * 3**0.5, "),
    ),
    mutant(
        "init-unseeded", "INIT-3", "-", (DRAW, "generator(seed, name)", "generator(__import__('time').time_ns(), name)")
    ),
    mutant("init-seed-ignored", "INIT-4", "litgpt#1425", (DRAW, "generator(seed, name)", "generator(0, name)")),
    mutant("init-std-one", "INIT-5", "-", (STD, "    return config.init_std\n", "    return 1.0\n")),
    mutant(
        "init-clobbers-loaded",
        "INIT-6",
        "transformers#46620, #45591",
        (LOAD, PUT, f"{PUT}; model.blocks[0].mlp.fc.reset_parameters()"),
    ),
    mutant("weights-not-loaded", "INIT-6", "-", (LOAD, PUT, "pass")),
    mutant(
        "master-weights-rounded-on-resume",
        "INIT-6",
        "nanotron#245, OpenTau#185",
        (
            "reference.training.saving:save",
            "weights: Any = run.module\n",
            "weights: Any = __import__('copy').deepcopy(run.module).bfloat16()\n",
        ),
    ),
    mutant(
        "resume-missing-starts-random",
        "INIT-7",
        "torchtitan#1311",
        (
            "reference.checkpoint.folder:find",
            "raise CheckpointError(\n",
            "return None\n        raise CheckpointError(\n",
        ),
    ),
    mutant(
        "meta-buffers-lost",
        "INIT-8",
        "torchtitan's freqs_cis",
        (
            "reference.model.initialization:materialize",
            "if owns_tensors(module):",
            "if list(module.parameters(recurse=False)):",
        ),
    ),
    mutant(
        "tie-broken-by-meta",
        "INIT-9",
        "facebookresearch/lingua#75, verl#7834",
        ("reference.model.initialization:materialize", "for other in others:", "for other in ():"),
        (
            "reference.model.initialization:tie",
            "module.weight = model.get_submodule(owner).weight",
            "pass",
        ),
    ),
    mutant(
        "meta-init-lost",
        "INIT-9",
        "litgpt#1150",
        (
            "reference.model.initialization:bind_reset_parameters",
            "nn.Linear | nn.Embedding)",
            "nn.Linear | nn.Embedding) and not module.weight.is_meta",
        ),
    ),
    mutant(
        "adapter-init-skipped",
        "INIT-10",
        "litgpt f3ef7c4d, 1f61627c",
        ("reference.model.initialization:require_reset_parameters", "if lost:", "if False:"),
        (
            "reference.model.initialization:materialize",
            "module.reset_parameters()",
            "getattr(module, 'reset_parameters', lambda: None)()",
        ),
    ),
    mutant(
        "init-differs-per-rank",
        "INIT-11",
        "litgpt#269, torchtitan#166, llm-foundry#830",
        (
            SETUP,
            PEAKS,
            "torch.manual_seed(config.seed + fabric.global_rank); nn.init.normal_(next(module.parameters())); " + PEAKS,
        ),
    ),
    mutant(
        "tied-head-drawn-again",
        "INIT-12",
        "transformers#46620 (drawn a second time)",
        (
            INITIALIZE,
            "modules = [module for module in model.modules() if owns_tensors(module)]",
            "modules = [module for module in model.modules() if owns_tensors(module)]; config.tie_embeddings and "
            "setattr(model.head, 'reset_parameters', partial(draw, model.head, 'head', config.n_embd**-0.5, seed))",
        ),
    ),
    mutant(
        "tied-embedding-scaled",
        "INIT-12",
        "Gemma and T5 scale a tied table, others do not",
        (STD, "    return config.init_std\n", "    return config.init_std * (1.3 if config.tie_embeddings else 1)\n"),
    ),
    mutant(
        "foreign-module-initialised-again",
        "INIT-13",
        "litgpt pretrain.initialize_weights, transformers#46620",
        (
            BUILD_MODULE,
            "return build(factory, strategy, fabric.device, sharded)",
            "return build(factory, strategy, fabric.device, sharded).apply(lambda m: nn.init.normal_(m.weight) "
            "if not hasattr(model, 'vocab_size') and isinstance(m, nn.Linear | nn.Embedding) else None)",
        ),
    ),
    mutant(
        "foreign-biases-zeroed",
        "INIT-13",
        "_init_weights of transformers, applied to every nn.Linear",
        (
            BUILD_MODULE,
            "return build(factory, strategy, fabric.device, sharded)",
            "return build(factory, strategy, fabric.device, sharded).apply(lambda m: nn.init.zeros_(m.bias) if "
            "isinstance(m, nn.Linear) and m.bias is not None else None)",
        ),
    ),
    mutant(
        "layers-start-with-the-same-values",
        "INIT-14",
        "netket/netket#241: the same seed for all layers",
        (
            "reference.model.initialization:draw",
            "generator(seed, name)",
            "generator(seed, str(tuple(module.weight.shape)))",
        ),
    ),
    mutant(
        "tables-ignore-std",
        "INIT-15",
        "huggingface/transformers#39772: 0.02 written into the initialisation of embeddings",
        (
            "reference.model.initialization:declared_std",
            "    return config.init_std\n",
            '    return 0.02 if name in ("embedding", "position") else config.init_std\n',
        ),
    ),
    mutant(
        "factory-called-before-the-seed",
        "INIT-16",
        "ThilinaRajapakse/simpletransformers#1478: the seed does not reach what builds the model",
        (BUILD_MODULE, "fabric.seed_everything(config.seed, verbose=False)", "pass"),
    ),
]
