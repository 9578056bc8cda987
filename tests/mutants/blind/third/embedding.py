"""Faults of embeddings: the swap for StableEmbedding, and fine-tuning."""

from tests.mutants.planting import DECAYED, PREPARE, Mutant, mutant

STABLE, OWN = "reference.model.embedding:stable_embedding", "reference.optimizers.override:own_override_manager"
ADAPTERS, KIND = "reference.finetuning.adapters:add_adapters", "kind = type(owner).__name__"

FAULTS: dict[str, list[Mutant]] = {
    "embedding": [
        mutant(
            "blind3-embedding-padding-row-is-trained",
            "",
            "Lightning-AI/litgpt at 26857050: padding_idx is not carried over to the new embedding",
            (STABLE, "padding_idx=plain.padding_idx", "padding_idx=None"),
        ),
        mutant(
            "blind3-embedding-norm-decays",
            "",
            "huggingface/transformers#16908: a norm that the rule for weight decay does not know",
            (
                DECAYED,
                KIND,
                f'if name in ("embedding.norm.weight", "position.norm.weight"):\n        return True\n    {KIND}',
            ),
        ),
        mutant(
            "blind3-embedding-swapped-unasked",
            "",
            "CarperAI/trlx#133: an 8-bit optimizer brings StableEmbedding along",
            (
                "reference.training.setup:wants_stable_embedding",
                "return config.stable_embedding",
                "return useful",
            ),
        ),
        mutant(
            "blind3-embedding-override-outlives-its-model",
            "",
            "bitsandbytes-foundation/bitsandbytes 0.50.2: 32 bits are kept by position, for the next model too",
            (OWN, "if not is_bitsandbytes(optimizer):", "if True:"),
        ),
        mutant(
            "blind3-embedding-all-state-keeps-32-bits",
            "",
            "ooples/AiDotNet#1238: an 8-bit optimizer whose state is not in 8 bits",
            (
                OWN,
                "wide = stable_embeddings(model)",
                "wide = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]",
            ),
        ),
    ],
    "finetuning": [
        mutant(
            "blind3-finetuning-both-matrices-drawn",
            "",
            "mflux-community/mflux#739, hao-ai-lab/FastVideo#781: the second matrix is not zero at the start",
            (
                "reference.finetuning.adapters:draw",
                'f".lora_A.{ADAPTER}." in name',
                '".lora_A." in name or ".lora_B." in name',
            ),
        ),
        mutant(
            "blind3-finetuning-base-not-frozen",
            "",
            "microsoft/aurora#167, Blaizzy/mlx-vlm#2181: the weights beside the adapters are trained too",
            (PREPARE, "module.requires_grad_(False)", "pass"),
        ),
        mutant(
            "blind3-finetuning-no-adapters-in-the-mlp",
            "",
            "unslothai/unsloth-zoo#1150: only some linear layers get adapters, without a word",
            (
                "reference.finetuning.prepare:linear_layers",
                'name.startswith("blocks.")',
                'name.startswith("blocks.") and ".mlp." not in name',
            ),
        ),
        mutant(
            "blind3-finetuning-adapters-in-16-bits",
            "",
            "Lorenzo-Mazza/VersatIL#5, huggingface/peft#1706: adapters in bfloat16, whose updates round to nothing",
            (ADAPTERS, "parameter.data.to(stored)", "parameter.data.to(torch.bfloat16)"),
        ),
        mutant(
            "blind3-finetuning-merge-misses-the-mlp",
            "",
            "huggingface/peft#788, unslothai/unsloth#869: a merge that leaves out adapters, without an error",
            (
                "reference.finetuning.merged:adapters",
                "if (found := MATRIX.fullmatch(name))",
                'if (found := MATRIX.fullmatch(name)) and ".mlp." not in name',
            ),
        ),
    ],
}
