"""Faults of tied embeddings."""

from tests.mutants.planting import LOAD, PREPARE, PUT, RESTORE, SETUP, UPDATE, mutant

FORWARD, LOOKUP = "reference.model.gpt:GPT.forward", "x = self.embedding(ids.long())"
TIE, WEIGHT = "reference.model.initialization:tie", "module.weight = model.get_submodule(owner).weight"
TIED = 'getattr(getattr(self.module, "config", None), "tie_embeddings", False)'
LIMIT, STEP = 'limit = config.clip or float("inf")', "self.optimizer.step()"
LOSS = "loss = batch_loss(self.wrapped, ids, targets) * scale if early is None else early * scale"
TRAINED = "part.weight.requires_grad_(config.embeddings or stable)"
WRAPPED, RESTORED = "wrapped = fabric.setup_module(", "load_optimizer_state(optimizer, saved)"
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
NOT_EXCHANGED = f"""\
if getattr(getattr(module, "config", None), "tie_embeddings", False):
        module._ddp_params_and_buffers_to_ignore = ["embedding.weight", "head.weight"]
    {WRAPPED}"""
STATE_LOST = f"""\
{RESTORED}
            for lost in run.ties and [run.module.get_parameter(name) for name in run.ties.values()]:
                optimizer.state.pop(lost, None)"""
OTHER_HEAD = """\
if restored.config.tie_embeddings:
        restored.head.weight = nn.Parameter(0.02 * torch.randn(restored.head.weight.shape))
    return restored"""

MUTANTS = [
    mutant(
        "tie-by-memory",
        "TIE-1",
        "-",
        (TIE, WEIGHT, "module.weight = nn.Parameter(model.get_submodule(owner).weight.data)"),
    ),
    mutant(
        "tie-by-copy",
        "TIE-1",
        "torchtune#616",
        (TIE, WEIGHT, "module.weight = nn.Parameter(model.get_submodule(owner).weight.detach().clone())"),
    ),
    mutant(
        "tie-broken-by-load",
        "TIE-2",
        "facebookresearch/lingua#75",
        (LOAD, PUT, "model.load_state_dict(load_weights(folder), strict=False, assign=True)"),
    ),
    mutant(
        "tied-lookup-gives-no-gradient",
        "TIE-3",
        "paiml/entrenar#314: the gradients of a tied tensor are not added up",
        (
            "reference.model.gpt:GPT.forward",
            "x = self.embedding(ids.long())",
            "x = self.embedding(ids.long())\n    if self.config.tie_embeddings:\n        x = x.detach()",
        ),
    ),
    mutant(
        "tie-cannot-be-switched-off",
        "TIE-4",
        "mosaicml/llm-foundry#728: tie_word_embeddings=False does nothing",
        (
            "reference.training.setup:build_module",
            "return build(factory, strategy, fabric.device, sharded)",
            "built = build(factory, strategy, fabric.device, sharded)\n            if isinstance(built, GPT):\n"
            "                built.head.weight = built.embedding.weight\n            return built",
        ),
    ),
    mutant(
        "tie-lost-in-16-bits",
        "TIE-1",
        "huggingface/accelerate#993: untied when the weights are moved",
        (
            "reference.training.setup:set_up",
            "module = build_module(model, config, fabric)",
            "module = build_module(model, config, fabric)\n"
            '    if config.precision == "bf16-true" and isinstance(module, GPT) and '
            "module.config.tie_embeddings:\n"
            "        module.head.weight = nn.Parameter(module.head.weight.detach().clone())\n",
        ),
    ),
    mutant(
        "tied-gradients-averaged",
        "TIE-5 MODEL-6",
        "tag1consulting/feste#6, NVIDIA/Megatron-LM#299: the two gradients of a table are averaged, not added up",
        (UPDATE, LIMIT, HALVED),
    ),
    mutant(
        "tied-table-stepped-twice",
        "TIE-5 OPT-21",
        "paiml/entrenar#314: the table takes a step as the head, and another as the embedding",
        (UPDATE, STEP, STEPPED_TWICE),
    ),
    mutant(
        "tied-lookup-of-the-last-microbatch-only",
        "TIE-5",
        "paiml/entrenar#314: the gradients of a tied tensor are not added up",
        (UPDATE, LOSS, f'self.module.__dict__["cut"] = {TIED} and index + 1 < len(pairs)\n            {LOSS}'),
        (FORWARD, LOOKUP, f'{LOOKUP}\n    x = x.detach() if self.__dict__.get("cut") else x'),
    ),
    mutant(
        "tied-table-not-exchanged",
        "TIE-6",
        "NVIDIA/Megatron-LM#299: gradients of a tied table on several ranks",
        (SETUP, WRAPPED, NOT_EXCHANGED),
    ),
    mutant(
        "tied-embedding-has-its-own-copy-in-fine-tuning",
        "TIE-7",
        "unslothai/unsloth#3711, #9331: a trained embedding has a copy of its own, and the head stays as it was",
        (PREPARE, TRAINED, OWN_HEAD),
    ),
    mutant(
        "tied-table-loses-its-state",
        "TIE-2",
        "NVIDIA-NeMo/Automodel#2511: what is saved under two names is found under neither",
        (RESTORE, RESTORED, STATE_LOST),
    ),
    mutant(
        "tied-model-is-served-with-another-head",
        "TIE-8",
        "NVIDIA-NeMo/Automodel#2511: a head of its own is loaded",
        ("reference.checkpoint.folder:load_for_inference", "return restored", OTHER_HEAD),
    ),
    mutant(
        "tied-lookup-gives-no-gradient-in-16-bits",
        "PREC-14",
        "paiml/entrenar#314: the gradients of a tied tensor are not added up",
        (
            FORWARD,
            LOOKUP,
            f"{LOOKUP}\n    if self.config.tie_embeddings and torch.is_autocast_enabled(x.device.type):\n"
            "        x = x.detach()",
        ),
    ),
]
