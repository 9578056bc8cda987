"""Faults of embeddings: the swap for StableEmbedding, and fine-tuning."""

from tests.mutants.planting import SETUP, Mutant, mutant

STABLE, SAME = "reference.model.embedding:stable_embedding", "stable.weight = plain.weight"
ADAPTERS, STORED = "reference.finetuning.adapters:add_adapters", "parameter.data = parameter.data.to(stored)"
STARTED = "reference.training.starting:started_from"
ROUNDED = f"""{SAME}
    with torch.no_grad():
        stable.weight.copy_(plain.weight.half())"""

FAULTS: dict[str, list[Mutant]] = {
    "embedding": [
        mutant(
            "blind4-embedding-gradient-by-frequency",
            "",
            "a common slip: the gradient of a row is divided by how often its token stands in the batch",
            (STABLE, "scale_grad_by_freq=plain.scale_grad_by_freq", "scale_grad_by_freq=True"),
        ),
        mutant(
            "blind4-embedding-frozen-table-is-trained",
            "",
            "Lightning-AI/litgpt at 26857050: a table that was frozen is trained after the swap",
            (STABLE, SAME, f"{SAME}.requires_grad_(True)"),
        ),
        mutant(
            "blind4-embedding-rounded-by-the-swap",
            "",
            "a common slip: the table goes through 16 bits when it is put into the new module",
            (STABLE, SAME, ROUNDED),
        ),
        mutant(
            "blind4-embedding-swapped-with-any-optimizer",
            "",
            "a common slip: the log says that the embedding stays plain, and it is swapped",
            ("reference.training.setup:wants_stable_embedding", "return False", "return True"),
        ),
        mutant(
            "blind4-embedding-export-restores-only-one",
            "",
            "a common slip: the model for inference has one plain table, and one that still has its norm",
            (
                "reference.model.embedding:restore_embeddings",
                "if is_stable(module):",
                "if is_stable(module) and not plain:",
            ),
        ),
    ],
    "finetuning": [
        mutant(
            "blind4-finetuning-first-matrix-frozen",
            "",
            "LoRA-FA (https://arxiv.org/abs/2308.03303), unasked: of each adapter only the second matrix is trained",
            (ADAPTERS, STORED, f'{STORED}\n            parameter.requires_grad_(".lora_B." in name)'),
        ),
        mutant(
            "blind4-finetuning-norms-start-anew",
            "",
            "pytorch/pytorch#141256: tensors whose names are not known are passed over, and norms start at 1",
            (
                SETUP,
                "module.load_state_dict(base.state_dict())",
                'module.load_state_dict({n: t for n, t in base.state_dict().items() if "norm" not in n}, strict=False)',
            ),
        ),
        mutant(
            "blind4-finetuning-merged-twice",
            "",
            "huggingface/peft#1355: the adapters are merged into weights that hold them already",
            (
                "reference.finetuning.merged:merged_weights",
                "plain[name].float() + delta",
                "plain[name].float() + 2 * delta",
            ),
        ),
        mutant(
            "blind4-finetuning-dropout-of-the-base-wins",
            "",
            "a common slip: the dropout that was asked for is replaced by that of the checkpoint",
            (
                STARTED,
                "return dataclasses.replace(base.config, **{name: getattr(model, name) for name in FREE})",
                "return base.config",
            ),
        ),
        mutant(
            "blind4-finetuning-starts-from-the-oldest",
            "",
            "fw-ai/cookbook#402: of the checkpoints of a run the first is taken, not the newest",
            ("reference.training.starting:base_folder", "next(reversed(", "next(iter("),
        ),
    ],
}
