"""Variants of the reference with a difference that must not matter: no clause may kill one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from conformance import Normal, TensorInfo
from conformance.recipe import Recipe
from conformance.subject import Distribution
from conformance.subjects.reference import Reference, ReferencePolicy
from reference import GPTConfig, TrainConfig
from tests.mutants.planting import ADDED, BUILD, EVALUATE, FIT, GROUPS, PREPARE, RATE, RESTORE, STD, UPDATE, Edit

FIT_NORM, FINETUNE = "reference.finetuning.closest:fit_norm", "conformance.subjects.reference:Reference.finetune_config"
ATTENTION, ONCE = "reference.model.gpt:Attention.forward", "reference.data.tokens:TokenData.passed_once"
BITSANDBYTES, OWN = "bitsandbytes.optim.AdamW8bit", "reference.optimizers.adamw8bit.AdamW8bit"


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


def answering(answers: Callable[..., Any] | dict[str, Any]) -> Callable[..., Any]:
    """A word of a policy: a function that answers, or else what is asked last decides the answer."""
    if not isinstance(answers, dict):
        return answers
    return lambda *asked: answers.get(asked[-1]) if answers else None


@dataclass(frozen=True)
class Harmless:
    """A variant that no clause may kill."""

    name: str
    model: tuple[tuple[str, Any], ...] = ()
    train: tuple[tuple[str, Any], ...] = ()
    edits: tuple[Edit, ...] = ()
    lacks: tuple[tuple[str, str], ...] = ()
    policy: tuple[tuple[str, Any], ...] = ()
    """Words that the policy says instead: for each its answers, by what is asked, or a function that answers. Without
    an answer it is silent."""

    def subject(self) -> Variant:
        """The subject to judge, inside ``planted(self.edits)``."""
        variant = Variant(self.name, dict(self.model), dict(self.train), dict(self.lacks))
        # Another model than the one that is written down has no declared forward.
        silent: dict[str, Any] = {"logits": {}, "logits_with_dropout": {}}
        words = (silent if self.model else {}) | dict(self.policy)
        methods = {name: staticmethod(answering(answers)) for name, answers in words.items()}
        policy = type("OtherPolicy", (ReferencePolicy,), methods)
        variant.policy = policy()
        return variant


def without_attention(recipe: Recipe, weights: Any, ids: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The logits of a GPT that drops everywhere but in the attention, whose scores have four dimensions."""
    return ReferencePolicy().logits_with_dropout(recipe, weights, ids, lambda x: x if x.ndim == 4 else drop(x))


def unit_logits(recipe: Recipe, tensor: TensorInfo) -> Distribution:
    """The initial weights of a GPT whose head makes logits of variance 1 from what its last norm leaves."""
    return (
        Normal(0.0, recipe.n_embd**-0.5) if tensor.name == "head.weight" else ReferencePolicy().initial(recipe, tensor)
    )


PLACES, SPLIT = "reference.data.tokens:TokenData.places", "np.divmod(numbers, self.sequences)"
FORWARD = "loss = batch_loss(self.wrapped, ids, targets) * scale if early is None else early * scale"
INSIDE_AUTOCAST = f"""\
kind = {{"32-true": torch.float32, "bf16-true": torch.bfloat16}}.get(config.precision)
            with torch.autocast("cpu", torch.bfloat16, enabled=kind is not None):
                torch.set_autocast_dtype("cpu", kind or torch.bfloat16)  # autocast() itself refuses float32 on a CPU
                {FORWARD}"""
NOT_FUSED = ("fused", "this variant does not ask for it")

HARMLESS = [
    Harmless("tied-head", model=(("tie_embeddings", True),), lacks=(("untied", "this variant always ties"),)),
    Harmless("grouped-query-attention", model=(("n_kv_head", 1),)),
    Harmless("no-biases", model=(("bias", False),)),
    Harmless("rotary-positions", model=(("position", "rotary"),)),
    Harmless("four-heads-with-rmsnorm", model=(("n_head", 4), ("norm", "rmsnorm"))),
    Harmless("compiled", train=(("compile", True),)),
    Harmless("saves-and-evaluates-each-update", train=(("save_every", 1), ("evaluate_every", 1))),
    Harmless("clips-at-a-large-norm", train=(("clip", lambda limit: limit or 1e6),)),
    Harmless("adamw8bit-of-our-own", train=(("optimizer", lambda path: OWN if path == BITSANDBYTES else path),)),
    Harmless(
        "activation-checkpointing",
        train=(("activation_checkpointing", True),),
        lacks=(("foreign-module", "the trainer checkpoints the blocks of its own GPT only"),),
    ),
    Harmless(
        "foreach-instead-of-fused",
        edits=(Edit(ADDED, 'return {"fused": True}', 'return {"foreach": True}'),),
        lacks=(("fused", "this variant asks for foreach"),),
    ),
    Harmless(
        "sharded-blocks-kept-until-backward",
        edits=(
            Edit(
                "reference.training.sharding:ShardedStrategy.shard",
                "fully_shard(block, mesh=ranks)",
                "fully_shard(block, mesh=ranks, reshard_after_forward=False)",
            ),
        ),
    ),
    Harmless(
        "embedding-trained-beside-adapters",
        edits=(
            Edit(
                PREPARE, "part.weight.requires_grad_(config.embeddings or stable)", "part.weight.requires_grad_(True)"
            ),
        ),
    ),
    Harmless(
        "norm-of-a-swapped-table-as-it-comes",
        edits=(
            Edit(FIT_NORM, "norm.weight.copy_(gain)", "pass"),
            Edit(FIT_NORM, "norm.bias.copy_(table.mean(0) - gain * rows.mean(0))", "pass"),
        ),
    ),
    Harmless(
        "adapters-with-another-alpha",
        edits=(Edit(FINETUNE, "lora_rank=recipe.lora_rank,", "lora_rank=recipe.lora_rank, lora_alpha=3,"),),
    ),
    Harmless(
        "groups-in-another-order",
        edits=(Edit(GROUPS, "return [group for group in groups if", "return [group for group in groups[::-1] if"),),
    ),
    Harmless(
        "the-rest-before-muon",
        edits=(
            Edit(
                "reference.optimizers.build:create_optimizer",
                "for role, part in parts if part",
                "for role, part in parts[::-1] if part",
            ),
        ),
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
    Harmless(
        "drops-what-is-left-over",
        edits=(Edit(PLACES, SPLIT, "np.divmod(numbers, self.sequences // 2 * 2)"),),
        policy=(("leftovers", {"epoch": "dropped"}),),
    ),
    Harmless(
        "repeats-what-is-left-over",
        edits=(Edit(PLACES, SPLIT, "np.divmod(numbers, -(-self.sequences // 2) * 2); positions %= self.sequences"),),
        policy=(("leftovers", {"epoch": "repeated"}),),
    ),
    Harmless(
        "drops-nowhere-in-attention-and-says-so",
        edits=(Edit(ATTENTION, "self.dropout if self.training else 0.0", "0.0"),),
        policy=(("logits_with_dropout", without_attention),),
    ),
    Harmless(
        "drops-weights-of-the-head",  # one mask for all sequences, which is meant
        edits=(
            Edit(
                "reference.model.gpt:GPT.forward",
                "return self.head(self.norm(x))",
                "return F.linear(self.norm(x), F.dropout(self.head.weight, self.config.dropout, self.training))",
            ),
        ),
        policy=(("logits_with_dropout", {}),),
    ),
    Harmless(
        "drops-the-tail-of-a-document-and-says-so",
        edits=(Edit(ONCE, "windows = -(-(self.tokens - 1) // length)", "windows = (self.tokens - 1) // length"),),
        policy=(("leftovers", {"tail": "dropped"}),),
    ),
    Harmless(
        "evaluates-the-last-batches",
        edits=(
            Edit(
                "reference.training.evaluation:validate",
                "itertools.islice(batches, run.config.evaluate_batches)",
                "list(batches)[-(run.config.evaluate_batches or 0) :]",
            ),
        ),
    ),
    Harmless(
        "lone-sequences-and-16-bits-by-a-mask",
        edits=(
            Edit(
                ATTENTION,
                "if past > 0 and time > 1:",
                "by_mask = past == 0 and (batch == 1 or q.dtype != torch.float32)\n"
                "    if by_mask or (past > 0 and time > 1):",
            ),
            Edit(ATTENTION, "is_causal=past == 0,", "is_causal=past == 0 and not by_mask,"),
        ),
    ),
    Harmless(
        "rates-and-validation-loss-in-float32",
        edits=(
            Edit(EVALUATE, "dtype=torch.float64", "dtype=torch.float32"),
            Edit(UPDATE, RATE, f"float(torch.tensor({RATE}))"),
        ),
    ),
    Harmless("updates-counted-from-0-in-reports", edits=(Edit(FIT, "update=update + 1,", "update=update,"),)),
    Harmless(
        "saved-decay-wins-and-is-declared",
        edits=(Edit(RESTORE, "group[key] = value", "pass"),),
        policy=(("wins_on_resume", {"lr": "recipe", "weight_decay": "checkpoint"}),),
    ),
    Harmless(
        "nothing-further-declared",
        policy=tuple((word, {}) for word in ("leftovers", "wins_on_resume", "logits", "logits_with_dropout")),
    ),
    Harmless("optimizer-not-fused", edits=(Edit(ADDED, 'return {"fused": True}', "return {}"),), lacks=(NOT_FUSED,)),
    Harmless("autocast-to-the-dtype-of-the-weights", edits=(Edit(UPDATE, FORWARD, INSIDE_AUTOCAST),)),
    Harmless(
        "logits-of-variance-1",
        edits=(
            Edit(
                STD,
                "    return config.init_std\n",
                "    return config.n_embd**-0.5 if name == 'head' else config.init_std\n",
            ),
        ),
        policy=(("initial", unit_logits),),
    ),
    Harmless(
        "optimizer-derived",
        edits=(
            Edit(
                BUILD,
                "optimizer = optimizer_class(groups, **keywords)",
                "optimizer = type('Own', (optimizer_class,), {})(groups, **keywords)",
            ),
        ),
    ),
    Harmless(
        "groups-with-names",
        edits=(
            Edit(
                GROUPS,
                "return [group for group in groups if",
                "return [group | {'label': 'some', 'lr_scale': 1.0} for group in groups if",
            ),
        ),
    ),
    Harmless(
        "gradients-cleared-before-backward",
        edits=(
            Edit(UPDATE, "    self.optimizer.zero_grad()\n", ""),
            Edit(
                UPDATE, "share = torch.zeros((), device=device)", "self.optimizer.zero_grad(); share = torch.zeros(())"
            ),
        ),
    ),
]
