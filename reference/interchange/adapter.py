"""What LoRA trained, as an adapter that peft loads beside the model in transformers; without importing either."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference import checkpoint
from reference.checkpoint.folder import WEIGHTS
from reference.errors import CheckpointError, ConfigurationError, first_line
from reference.files import new_folder
from reference.finetuning.merged import adapters
from reference.interchange.huggingface import to_json
from reference.interchange.layout import GPT2, Layout, choose_layout, their_names, their_shapes
from reference.model.gpt import GPT

PREFIX = "base_model.model."  # of every tensor in peft's files
EMBEDDINGS = ("embedding.weight", "position.weight")


def export_adapter(folder: str | Path, out: str | Path) -> Path:
    """Write the adapters of a fine-tuned checkpoint as a folder that ``PeftModel.from_pretrained`` reads.

    The base is the model of transformers that the run started from. If the embedding was trained, the folder holds it
    too, plain; and the head as well, if it was tied to it: the two are trained apart from then on.

    Args:
        folder: a checkpoint of a run with LoRA.
        out: folder to make; it must not exist yet, or be empty.

    Returns:
        ``out``, with adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged, or the folder cannot be written.
        ConfigurationError: if the run trained no adapters, transformers has no class for the model, or ``out`` is not
            empty.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder, out = Path(folder), Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigurationError(f"{out} is there already, and is not an empty folder: give another place.")
    config = checkpoint.load_finetuning(folder)
    if config.lora_rank is None:
        raise ConfigurationError(
            f"{folder} has no adapters, because its run trained every weight: export it with --format huggingface."
        )
    model = checkpoint.load_for_inference(folder)
    layout = choose_layout(model.config)
    weights = checkpoint.load_weights(folder)
    tensors = their_adapters(layout, model, adapters(weights))
    saved = {}
    if config.embeddings or "embedding.norm.weight" in weights:
        saved = trained_tables(layout, model, tied=checkpoint.load_config(folder)["model"]["tie_embeddings"])
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors}
    told = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # whoever loads it names the model
        "r": config.lora_rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": sorted(modules),
        "modules_to_save": sorted({name.rpartition(".")[0].rpartition(".")[2] for name in saved}) or None,
        "fan_in_fan_out": layout is GPT2,  # its layers keep the transpose
        "bias": "none",
        "inference_mode": True,
    }
    try:
        with new_folder(Path(os.path.realpath(out))) as add:
            add("adapter_model.safetensors", lambda path: save_file(tensors | saved, path, metadata={"format": "pt"}))
            add("adapter_config.json", lambda path: path.write_bytes(to_json(told)))
    except (OSError, SafetensorError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{out} could not be written: {reason}. Make room, or give another place.") from error
    return out


def their_adapters(layout: Layout, model: GPT, pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return the two matrices of each adapter under peft's names; those of a layer that they split, once for each part.

    Raises:
        CheckpointError: if an adapter belongs to no layer of the model.
    """
    tensors: dict[str, Tensor] = {}
    for layer, (first, second) in pairs.items():
        name = f"{layer}.weight"
        try:
            shape = model.get_parameter(name).shape
        except AttributeError as error:
            raise CheckpointError(f"{WEIGHTS} has an adapter for {layer}, which the model does not have.") from error
        theirs = their_names(layout, name)
        parts = their_shapes(layout, model.config, name, shape)
        sizes = [part[0] for part in parts] if len(theirs) > 1 else [second.size(0)]
        for place, rows in zip(theirs, second.split(sizes), strict=True):
            stem = f"{PREFIX}{layout.prefix}{place.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = first.clone(memory_format=torch.contiguous_format)
            tensors[f"{stem}.lora_B.weight"] = rows.clone(memory_format=torch.contiguous_format)
    return tensors


def trained_tables(layout: Layout, model: GPT, tied: bool) -> dict[str, Tensor]:
    """Return the embeddings under peft's names, and the head if it was trained as the embedding's weight.

    Args:
        layout: of the class in transformers.
        model: plain; its head is a weight of its own if it was tied to a StableEmbedding.
        tied: whether the head was the embedding's weight in training.
    """
    own: dict[str, Any] = model.state_dict()
    names = [name for name in EMBEDDINGS if name in own] + ["head.weight"] * tied
    found = {}
    for name in names:
        (place,) = their_names(layout, name)
        prefix = PREFIX if name == "head.weight" else f"{PREFIX}{layout.prefix}"
        found[f"{prefix}{place}"] = own[name].clone()
    return found
