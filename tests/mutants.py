"""Planted faults and harmless variants of the reference: how the suite proves that it can tell them apart.

A mutant is the reference with one fault, made by replacing text in one function (now and then two). Each comes from
a published bug where there is one. ``tests/test_mutants.py`` demands that the clauses named beside it kill it, and
that the harmless variants are killed by none.
"""

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

from conformance.recipe import Recipe
from conformance.subjects.reference import Reference
from reference import GPTConfig, TrainConfig


@dataclass(frozen=True)
class Edit:
    """Replace ``old`` by ``new`` in the source of one function, ``module:qualified.name``."""

    function: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """The reference with one fault."""

    name: str
    killers: tuple[str, ...]
    """Clauses that must fail on it."""
    published: str
    """Where the fault was seen."""
    edits: tuple[Edit, ...]


def resolve(path: str) -> FunctionType:
    """The plain function behind ``module:qualified.name``, without its decorators."""
    module_name, _, qualified = path.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in qualified.split("."):
        found = getattr(found, part)
    function = inspect.unwrap(found)
    assert isinstance(function, FunctionType)
    return function


@contextmanager
def planted(edits: tuple[Edit, ...]) -> Iterator[None]:
    """Apply edits to the running program, and take them back.

    The code object is exchanged, so that every name under which the function was imported sees the fault.

    Raises:
        ValueError: if the text to replace is not there exactly once: the reference has changed, so must the mutant.
    """
    with ExitStack() as stack:
        for edit in edits:
            function = resolve(edit.function)
            stack.callback(setattr, function, "__code__", function.__code__)
            function.__code__ = edited_code(function, edit)
        yield


def edited_code(function: FunctionType, edit: Edit) -> Any:
    """The code object of the function with the edit."""
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(edit.old) != 1:
        raise ValueError(f"{edit.old!r} stands {source.count(edit.old)} times in {edit.function}, not once")
    namespace: dict[str, Any] = {}
    # Registered code of this repository, from the table below; nothing from outside.
    exec(
        compile(source.replace(edit.old, edit.new), f"<mutant of {edit.function}>", "exec"),
        function.__globals__,
        namespace,
    )
    code = inspect.unwrap(namespace[function.__name__]).__code__
    if code.co_freevars != function.__code__.co_freevars:
        raise ValueError(f"{edit.function} closes over {function.__code__.co_freevars}; edit another function")
    return code


FIT, BUILD_MODULE = "reference.trainer:Trainer.fit", "reference.trainer:Trainer.build_module"
BUILD, ADDED = "reference.optimizer:build_optimizer", "reference.optimizer:added_keywords"
GROUPS, DECAYED = "reference.optimizer:decay_groups", "reference.optimizer:is_decayed"
DRAW, STD = "reference.initialize:draw", "reference.initialize:declared_std"
LAUNCH, RESTORE = "reference.trainer:launch", "reference.trainer:restore"
STABLE = "reference.embedding:stable_embedding"
MERGE = "| dict(arguments)"
PEAKS = 'peaks = [group["lr"] for group in bare.param_groups]'


def mutant(name: str, killers: str, published: str, *edits: tuple[str, str, str]) -> Mutant:
    """A row of the table below; ``killers`` are clause ids with spaces between."""
    return Mutant(name, tuple(killers.split()), published, tuple(Edit(*edit) for edit in edits))


def keywords_without(condition: str) -> str:
    """The user's keywords, filtered by a condition on ``k``."""
    return f"| {{k: v for k, v in arguments.items() if {condition}}}"


MUTANTS = [
    # INIT ------------------------------------------------------------------------------------------------------------
    mutant(
        "init-empty-memory-single-device",
        "INIT-1",
        "litgpt#689, #759, #1150",
        (BUILD_MODULE, "empty_init=False", "empty_init=True"),
        ("reference.initialize:initialize", "module.reset_parameters()", "pass"),
    ),
    mutant(
        "init-skipped-fresh-run",
        "INIT-2",
        "litgpt#1150",
        ("reference.initialize:initialize", "module.reset_parameters()", "pass"),
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
        (STD, "math.sqrt(2 * n_layer)", "math.sqrt(2 * 2)"),
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
    mutant("init-std-one", "INIT-5", "-", (STD, "    return init_std\n", "    return 1.0\n")),
    mutant(
        "init-clobbers-loaded",
        "INIT-6",
        "transformers#46620, #45591",
        (
            RESTORE,
            "checkpoint.load_model(folder, module)",
            "checkpoint.load_model(folder, module); module.blocks[0].mlp.fc.reset_parameters()",
        ),
    ),
    mutant("weights-not-loaded", "INIT-6", "-", (RESTORE, "checkpoint.load_model(folder, module)", "pass")),
    mutant(
        "master-weights-rounded-on-resume",
        "INIT-6",
        "nanotron#245, OpenTau#185",
        ("reference.checkpoint:save", "save_model(model,", "save_model(__import__('copy').deepcopy(model).bfloat16(),"),
    ),
    mutant(
        "resume-missing-starts-random",
        "INIT-7",
        "torchtitan#1311",
        (
            "reference.checkpoint:find",
            "if not is_complete(folder):\n",
            "if not is_complete(folder):\n        return None\n",
        ),
    ),
    mutant(
        "meta-buffers-lost",
        "INIT-8",
        "torchtitan's freqs_cis",
        ("reference.initialize:materialize", "if owns_tensors(module):", "if list(module.parameters(recurse=False)):"),
    ),
    mutant(
        "tie-broken-by-meta",
        "INIT-9",
        "facebookresearch/lingua#75, verl#7834",
        ("reference.initialize:materialize", "for other in others:", "for other in ():"),
        (
            "reference.initialize:tie",
            "module.weight = model.get_submodule(owner).weight",
            "pass",
        ),
    ),
    mutant(
        "meta-init-lost",
        "INIT-9",
        "litgpt#1150",
        (
            "reference.initialize:bind_reset_parameters",
            "nn.Linear | nn.Embedding)",
            "nn.Linear | nn.Embedding) and not module.weight.is_meta",
        ),
    ),
    mutant(
        "adapter-init-skipped",
        "INIT-10",
        "litgpt f3ef7c4d, 1f61627c",
        ("reference.initialize:require_reset_parameters", "if lost:", "if False:"),
        (
            "reference.initialize:materialize",
            "module.reset_parameters()",
            "getattr(module, 'reset_parameters', lambda: None)()",
        ),
    ),
    mutant(
        "init-differs-per-rank",
        "INIT-11",
        "litgpt#269, torchtitan#166, llm-foundry#830",
        (
            FIT,
            PEAKS,
            "torch.manual_seed(config.seed + fabric.global_rank); nn.init.normal_(next(module.parameters())); " + PEAKS,
        ),
    ),
    # OPT -------------------------------------------------------------------------------------------------------------
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
        (FIT, PEAKS, "peaks = [1e-3 for group in bare.param_groups]"),
    ),
    mutant(
        "injected-overrides-user",
        "OPT-8",
        "litgpt instantiate_torch_optimizer",
        (ADDED, 'if "fused" in arguments:', "if False:"),
        (
            BUILD,
            "added_keywords(optimizer_class, arguments, device, scaled) | dict(arguments)",
            "dict(arguments) | added_keywords(optimizer_class, arguments, device, scaled)",
        ),
    ),
    mutant(
        "user-config-mutated",
        "OPT-9",
        "litgpt instantiate_torch_optimizer",
        (
            BUILD,
            "keywords = added_keywords(optimizer_class, arguments, device, scaled) | dict(arguments)",
            "keywords = arguments; keywords.update(added_keywords(optimizer_class, arguments, device, scaled))",
        ),
    ),
    mutant(
        "kwarg-typo-swallowed",
        "OPT-10",
        "pykale#587, DeepTab#415",
        ("reference.optimizer:check_keywords", "if key not in named and not takes_any:", "if False:"),
        (BUILD, MERGE, keywords_without("accepts(optimizer_class, k)")),
    ),
    mutant(
        "kwarg-typo-unexplained",
        "OPT-11",
        "-",
        ("reference.optimizer:check_keywords", 'f"did you mean {nearest[0]!r}? " if nearest else ""', '""'),
    ),
    mutant(
        "opt-state-not-saved",
        "OPT-12",
        "OneVision-Encoder#65, DeepSpeed#7786",
        (RESTORE, 'load_optimizer_state(optimizer, state["optimizer"])', "pass"),
    ),
    mutant(
        "opt-state-outside-state",
        "OPT-13",
        "grokadamw 0.1.2",
        ("reference.optimizer:optimizer_state", 'state["state_in_groups"] = misplaced', "pass"),
    ),
    # DECAY -----------------------------------------------------------------------------------------------------------
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
        (BUILD, "groups: Any = decay_groups(model, decay)", "groups: Any = trainable(model)"),
    ),
    mutant(
        "decay-coupled",
        "DECAY-4",
        "joennlae/tensorli#1, pytorch#4429",
        (
            BUILD,
            "optimizer_class(groups, **keywords)",
            "(torch.optim.Adam if optimizer_class is torch.optim.AdamW else optimizer_class)(groups, **keywords)",
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
    mutant("decay-ndim-off-by-one", "DECAY-7", "-", (GROUPS, "parameter.ndim >= 2 if", "parameter.ndim >= 1 if")),
    mutant(
        "decay-compile-prefix",
        "DECAY-8",
        "pytorch#101107, LLMs-from-scratch#580",
        (
            FIT,
            "config.optimizer_args, module,",
            "config.optimizer_args, torch.compile(module) if config.compile else module,",
        ),
        (
            DECAYED,
            "isinstance(owner, nn.Embedding) or EMBEDDING.search(kind)",
            'name.startswith(("embedding.", "position."))',
        ),
    ),
    # PREC ------------------------------------------------------------------------------------------------------------
    mutant("logits-left-as-computed", "PREC-1", "litgpt#1508", (LAUNCH, 'if config.logits == "compute":', "if True:")),
    mutant("opt-out-ignored", "PREC-2", "-", (LAUNCH, 'if config.logits == "compute":', "if False:")),
    mutant(
        "loss-in-bf16",
        "PREC-3",
        "modalities#464, marin#8217",
        ("reference.update:token_loss", "logits.float()", "logits.bfloat16()"),
    ),
    mutant(
        "loss-not-upcast",
        "PREC-3",
        "modalities#464",
        ("reference.update:token_loss", "logits.float().flatten", "logits.flatten"),
    ),
    mutant(
        "precision-ignored",
        "PREC-4",
        "litgpt#1802, #1814",
        (LAUNCH, "precision=config.precision,", 'precision="32-true",'),
    ),
    mutant(
        "precision-always-bf16",
        "PREC-4",
        "litgpt#1814",
        (LAUNCH, "precision=config.precision,", 'precision="bf16-mixed",'),
    ),
    mutant(
        "autocast-too-wide-backward",
        "PREC-5",
        "pytorch#120376, GradCache#17",
        (
            "reference.update:accumulate",
            "        fabric.backward(loss)",
            "        with fabric.strategy.precision.forward_context():\n                fabric.backward(loss)",
        ),
    ),
    mutant(
        "autocast-too-wide-step",
        "PREC-5",
        "pytorch#120376",
        (
            FIT,
            "        optimizer.step()\n",
            "        with fabric.strategy.precision.forward_context():\n            optimizer.step()\n",
        ),
    ),
    mutant(
        "bf16-update-lost",
        "PREC-6",
        "pytorch/ao#1124, torchtune#2254",
        ("reference.trainer:warn_about_rounding", 'if config.precision == "bf16-true"', "if False"),
    ),
    mutant(
        "rope-phase-bf16",
        "PREC-7",
        "transformers#25681, #29285, gpt-neox#1003",
        (
            "reference.model:Rotary.reset_parameters",
            "torch.outer(position, self.theta**-exponent)",
            "torch.outer(position.to(self.cos.dtype), (self.theta**-exponent).to(self.cos.dtype))",
        ),
    ),
    # EMB -------------------------------------------------------------------------------------------------------------
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
        ("reference.embedding:swap_embeddings", "if module.sparse:", "if False:"),
        (STABLE, "sparse=plain.sparse,", ""),
    ),
    mutant(
        "stableemb-unfrozen-not-optimised",
        "EMB-3",
        "litgpt finetune/lora.py",
        (
            FIT,
            "swap_embeddings(module)  # before the optimizer, which must own the tensors that are trained",
            "pass",
        ),
        (
            BUILD,
            "own_override_manager(optimizer, model)",
            "__import__('reference').swap_embeddings(model) if is_bitsandbytes(optimizer_class) else None",
        ),
    ),
    mutant(
        "bnb-32bit-override-ignored",
        "EMB-4",
        "bitsandbytes#1269",
        (
            "reference.optimizer:own_override_manager",
            '[(module, "weight", {"optim_bits": 32}) for module in wide] + registered',
            "[]",
        ),
    ),
    mutant(
        "bnb-override-leaks",
        "EMB-5",
        "bitsandbytes 0.50.2",
        ("reference.optimizer:own_override_manager", "if not is_bitsandbytes(optimizer):", "if True:"),
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
        ("reference.embedding:swap_wanted", "if requested and not is_bitsandbytes(optimizer_class):", "if False:"),
    ),
    mutant(
        "stableemb-not-exported",
        "EMB-8",
        "litgpt save_lora_checkpoint",
        (
            "reference.embedding:folded",
            "weight = norm(table.to(norm.weight.dtype)).to(stable.weight.dtype)",
            "weight = table.clone()",
        ),
        ("reference.embedding:restore_embeddings", "if plain:", "if False:"),
    ),
    mutant(
        "stableemb-kept-for-inference",
        "EMB-8",
        "-",
        ("reference.embedding:restore_embeddings", "if is_stable(module):", "if False:"),
    ),
]


class Variant(Reference):
    """The reference with a difference that must not matter."""

    def __init__(self, name: str, model: dict[str, Any], train: dict[str, Any], lacks: dict[str, str]) -> None:
        self.name, self.model, self.train_changes = name, model, train
        self.lacks = Reference.lacks | lacks

    def model_config(self, recipe: Recipe) -> GPTConfig:
        return replace(super().model_config(recipe), **self.model)

    def train_config(self, recipe: Recipe) -> TrainConfig:
        changes = {
            key: value(getattr(super(Variant, self).train_config(recipe), key)) if callable(value) else value
            for key, value in self.train_changes.items()
        }
        return replace(super().train_config(recipe), **changes)


@dataclass(frozen=True)
class Harmless:
    """A variant that no clause may kill."""

    name: str
    model: tuple[tuple[str, Any], ...] = ()
    train: tuple[tuple[str, Any], ...] = ()
    edits: tuple[Edit, ...] = ()
    lacks: tuple[tuple[str, str], ...] = ()

    def subject(self) -> Variant:
        """The subject to judge, inside ``planted(self.edits)``."""
        return Variant(self.name, dict(self.model), dict(self.train), dict(self.lacks))


HARMLESS = [
    Harmless("tied-head", model=(("tie_embeddings", True),)),
    Harmless("grouped-query-attention", model=(("n_kv_head", 1),)),
    Harmless("no-biases", model=(("bias", False),)),
    Harmless("rotary-positions", model=(("position", "rotary"),)),
    Harmless("four-heads-with-rmsnorm", model=(("n_head", 4), ("norm", "rmsnorm"))),
    Harmless("compiled", train=(("compile", True),)),
    Harmless("saves-and-evaluates-each-update", train=(("save_every", 1), ("evaluate_every", 1))),
    Harmless("clips-at-a-large-norm", train=(("clip", 1e6),)),
    Harmless("dropout", model=(("dropout", 0.1),)),
    Harmless(
        "foreach-instead-of-fused",
        edits=(Edit(ADDED, 'return {"fused": True}', 'return {"foreach": True}'),),
        lacks=(("fused", "this variant asks for foreach"),),
    ),
    Harmless(
        "groups-in-another-order",
        edits=(Edit(GROUPS, "return [group for group in groups if", "return [group for group in groups[::-1] if"),),
    ),
    Harmless(
        "parameters-in-another-order",
        edits=(
            Edit(
                GROUPS,
                "in model.named_parameters(remove_duplicate=False):",
                "in reversed(list(model.named_parameters(remove_duplicate=False))):",
            ),
        ),
    ),
]
