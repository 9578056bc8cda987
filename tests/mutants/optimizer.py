"""Faults of the optimizer's keyword arguments and state."""

from tests.mutants.planting import ADDED, BUILD, PEAKS, RESTORE, SETUP, mutant

MERGE = "| dict(arguments)"


def keywords_without(condition: str) -> str:
    """The user's keywords, filtered by a condition on ``k``."""
    return f"| {{k: v for k, v in arguments.items() if {condition}}}"


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
        ("reference.optimizers.state:optimizer_state", 'state["state_in_groups"] = misplaced', "pass"),
    ),
]
