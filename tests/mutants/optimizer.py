"""Faults of the optimizer's keyword arguments and state."""

from tests.mutants.planting import ADDED, BUILD, PEAKS, RESTORE, SETUP, mutant

MERGE = "| dict(arguments)"


def keywords_without(condition: str) -> str:
    """The user's keywords, filtered by a condition on ``k``."""
    return f"| {{k: v for k, v in arguments.items() if {condition}}}"


ROLES = "reference.optimizers.build:create_optimizer"
BUILT = "optimizer_class(groups, **keywords)"
ALL = "for g in o.param_groups for p in g['params'] if p.grad is not None"


def inside_step(before: str = "None", after: str = "None") -> str:
    """Build the optimizer with something done inside its step, where only its movement shows it.

    Hooks of an optimizer run between those of the recorder. ``o`` is the optimizer.
    """
    hooks = f"optimizer.register_step_pre_hook(lambda o, *_: ({before}, None)[1]); "
    return f"{BUILT}; {hooks}optimizer.register_step_post_hook(lambda o, *_: ({after}, None)[1])"


MUTANTS = [
    mutant(
        "fused-kwarg-injected",
        "OPT-1 OPT-2 OPT-3",
        "litgpt#1743, torchtune#2152",
        (ADDED, 'if not accepts(optimizer_class, "fused"):', "if False:"),
    ),
    mutant(
        "varkwargs-optimizer-gets-nothing",
        "OPT-4",
        "litgpt instantiate_torch_optimizer, string form",
        (BUILD, MERGE, keywords_without("accepts(optimizer_class, k)")),
    ),
    mutant(
        "known-keywords-only",
        "OPT-5",
        "2U1/Qwen-VL-Series-Finetune#81",
        (BUILD, MERGE, keywords_without("k in ('lr', 'betas', 'eps', 'weight_decay', 'fused')")),
    ),
    mutant("fused-never", "OPT-6", "-", (ADDED, 'return {"fused": True}', "return {}")),
    mutant("eps-not-plumbed", "OPT-7", "NVIDIA-NeMo/Speech#775", (BUILD, MERGE, keywords_without("k != 'eps'"))),
    mutant("weight-decay-not-plumbed", "OPT-7", "-", (BUILD, MERGE, keywords_without("k != 'weight_decay'"))),
    mutant(
        "betas-swapped",
        "OPT-7",
        "EleutherAI/gpt-neox#228",
        (BUILD, MERGE, "| {k: v[::-1] if k == 'betas' else v for k, v in arguments.items()}"),
    ),
    mutant(
        "lr-config-dead",
        "OPT-7",
        "2U1/Qwen-VL-Series-Finetune#81",
        (SETUP, PEAKS, "peaks = [1e-3 for group in bare.param_groups]"),
    ),
    mutant(
        "injected-overrides-user",
        "OPT-8",
        "litgpt instantiate_torch_optimizer",
        (ADDED, 'if "fused" in arguments:', "if False:"),
        (
            BUILD,
            "keywords = added | dict(arguments)",
            "keywords = dict(arguments) | added",
        ),
    ),
    mutant(
        "user-config-mutated",
        "OPT-9",
        "litgpt instantiate_torch_optimizer",
        (
            BUILD,
            "keywords = added | dict(arguments)",
            "keywords = arguments; keywords.update(added)",
        ),
    ),
    mutant(
        "kwarg-typo-swallowed",
        "OPT-10",
        "pykale#587, DeepTab#415",
        ("reference.optimizers.build:check_keywords", "if key not in named and not takes_any:", "if False:"),
        (BUILD, MERGE, keywords_without("accepts(optimizer_class, k)")),
    ),
    mutant(
        "kwarg-typo-unexplained",
        "OPT-11",
        "-",
        ("reference.optimizers.build:check_keywords", 'f"did you mean {nearest[0]!r}? " if nearest else ""', '""'),
    ),
    mutant(
        "opt-state-not-saved",
        "OPT-12 RESUME-1",
        "OneVision-Encoder#65, DeepSpeed#7786",
        (RESTORE, "load_optimizer_state(optimizer, saved)", "pass"),
    ),
    mutant(
        "opt-state-outside-state",
        "OPT-13",
        "grokadamw 0.1.2",
        ("reference.optimizers.state:state_of_one", 'state["state_in_groups"] = misplaced', "pass"),
    ),
    mutant(
        "clipped-inside-the-step",
        "OPT-14",
        "grokadamw 0.1.2 (clips each tensor inside its step)",
        (BUILD, BUILT, inside_step(f"[p.grad.clamp_(-1e-3, 1e-3) {ALL}]")),
    ),
    mutant(
        "eps-of-its-own",
        "OPT-14",
        "NVIDIA-NeMo/Speech#775 (an eps that is not the configured one)",
        (
            BUILD,
            BUILT,
            inside_step(
                "[g.update(own=g['eps'], eps=1e-6) for g in o.param_groups if 'eps' in g]",
                "[g.update(eps=g.pop('own')) for g in o.param_groups if 'own' in g]",
            ),
        ),
    ),
    mutant(
        "moments-without-bias-correction",
        "OPT-14",
        "NVIDIA/apex FusedAdam with bias_correction=False, BERT's AdamWeightDecayOptimizer",
        (
            BUILD,
            BUILT,
            inside_step(after="[s['step'].fill_(10**6) for s in o.state.values() if hasattr(s.get('step'), 'fill_')]"),
        ),
    ),
    mutant(
        "decay-applied-twice",
        "OPT-14 DECAY-4",
        "PaddlePaddle/Paddle#5836",
        (
            BUILD,
            BUILT,
            inside_step(f"[p.data.mul_(1 - g['lr'] * g.get('weight_decay', 0)) {ALL}]"),
        ),
    ),
    mutant(
        "stops-stepping-at-update-3",
        "OPT-14 OPT-17",
        "pytorch#115607",
        (
            BUILD,
            BUILT,
            inside_step(
                "[g.update(own=g['lr'], lr=0.0) for g in o.param_groups if o.__dict__.setdefault('n', []).append(0) "
                "or len(o.n) > 4]",
                "[g.update(lr=g.pop('own')) for g in o.param_groups if 'own' in g]",
            ),
        ),
    ),
    mutant(
        "embedding-stops-after-update-2",
        "OPT-14 OPT-17",
        "a captured step that acts on a copy of one tensor",
        (
            BUILD,
            BUILT,
            inside_step(
                "o.__dict__.setdefault('n', []).append(0) or len(o.n) > 2 and "
                "setattr(o.param_groups[-1]['params'][0], 'grad', None)"
            ),
        ),
    ),
    mutant(
        "weights-rounded-inside-the-step",
        "OPT-14 OPT-15",
        "nanotron#245 (weights stored in 16 bits beside an optimizer in 32)",
        (
            BUILD,
            BUILT,
            inside_step(after="[p.data.copy_(p.data.bfloat16()) for g in o.param_groups for p in g['params']]"),
        ),
    ),
    mutant(
        "state-cleared-at-each-step",
        "OPT-14 OPT-15",
        "an optimizer that is built anew for each update",
        (BUILD, BUILT, inside_step("o.state.clear()")),
    ),
    mutant(
        "momentum-not-plumbed",
        "OPT-15",
        "a list of keywords that AdamW has",
        (BUILD, MERGE, keywords_without("k not in ('momentum', 'nesterov', 'alpha')")),
    ),
    mutant(
        "other-optimizers-without-their-state",
        "OPT-15",
        "OneVision-Encoder#65: what is not called exp_avg is dropped",
        (BUILD, BUILT, inside_step("[s.pop('momentum_buffer', None) for s in o.state.values()]")),
    ),
    mutant(
        "fused-sgd-of-16-bit-weights",
        "OPT-16",
        "pytorch#191763",
        (
            ADDED,
            'skips = narrow and device.type == "cpu" and issubclass(optimizer_class, torch.optim.SGD)',
            "skips = False",
        ),
    ),
    mutant(
        "coarse-gradients-vanish",
        "OPT-16",
        "gradients cast to a narrower dtype on the way",
        (
            BUILD,
            BUILT,
            inside_step(f"[p.grad.mul_(p.grad.abs() > p.grad.abs().mean()) {ALL} if p.dtype == torch.bfloat16]"),
        ),
    ),
    mutant(
        "last-tensor-beside-muon-in-neither",
        "OPT-19",
        "a list of modules for each optimizer that leaves one out",
        (
            ROLES,
            "(second[0], everything - matrices)",
            "(second[0], everything - matrices - {id(trainable(model)[-1])})",
        ),
    ),
    mutant(
        "embedding-given-to-muon",
        "OPT-19",
        "KellerJordan/Muon: embeddings and heads are not for Muon; every matrix by its dimensions",
        (ROLES, "matrices = block_matrices(model)", "matrices = {id(p) for p in trainable(model) if p.ndim == 2}"),
    ),
    mutant(
        "8-bit-state-widened",
        "OPT-18",
        "bitsandbytes: min_8bit_size of its own",
        (
            BUILD,
            BUILT,
            "optimizer_class(groups, **keywords, **({'min_8bit_size': 10**9} if '8bit' in config.optimizer else {}))",
        ),
    ),
    mutant(
        "without-decay-misses-a-tensor-in-its-group",
        "OPT-5",
        "huggingface/accelerate#3256: a trainable tensor is not in the optimizer",
        ("reference.optimizers.build:create_one", "if decays else parameters", "if decays else parameters[1:]"),
    ),
    mutant(
        "rest-has-rate-of-first",
        "OPT-20",
        "deepspeedai/DeepSpeed#8171, #8440: the rate of the first is everybody's",
        (
            "reference.optimizers.roles:roles",
            "optimizer_args=config.optimizer_rest_args)]",
            'optimizer_args={**config.optimizer_rest_args, **{"lr": config.optimizer_args["lr"]}}'
            ' if "lr" in config.optimizer_args else config.optimizer_rest_args)]',
        ),
    ),
    mutant(
        "zero-becomes-the-default",
        "OPT-7",
        "unslothai/unsloth-zoo#818: an explicit zero is taken for a missing setting",
        (
            "reference.optimizers.build:create_one",
            "keywords = added | dict(arguments)",
            "keywords = added | {k: v for k, v in arguments.items() if v or isinstance(v, bool)}",
        ),
    ),
]
