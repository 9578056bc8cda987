"""To and from the files of transformers: GPT2LMHeadModel and LlamaForCausalLM, without importing transformers.

=====================  ==========================================================================================
GPT2LMHeadModel        LayerNorm, learned positions, GELU, as many key/value heads as query heads
LlamaForCausalLM       RMSNorm, rotary positions, SwiGLU, grouped-query attention, biases everywhere or nowhere
=====================  ==========================================================================================

In both directions the logits are the same but for the rounding of sums. Only JSON and safetensors are read, which
hold no code; pickled weights (pytorch_model.bin) are refused.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from reference import checkpoint, files
from reference.config import GPTConfig, TrainConfig, allows, as_plain, in_words
from reference.data.chat import config_in, template_in
from reference.data.tokenizer import FILE, TEMPLATE, ByteTokenizer, FileTokenizer, load_tokenizer
from reference.errors import CheckpointError, ConfigurationError, first_line
from reference.files import new_folder
from reference.interchange.layout import (
    GPT2,
    LAYOUTS,
    Layout,
    choose_layout,
    is_transposed,
    our_shapes,
    their_names,
    their_shapes,
)
from reference.model.gpt import GPT

logger = logging.getLogger("reference")

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
WEIGHT_TYPES = {"F32", "F16", "BF16"}  # safetensors' names of the dtypes that float32 holds exactly
FINITE = torch.finfo(torch.float32).max
END = "<|endoftext|>"  # the end of a document, in the tokenizer.json that is made for bytes


# out -------------------------------------------------------------------------------------------------------------


def export_huggingface(folder: str | Path, out: str | Path) -> Path:
    """Write a checkpoint as a folder that ``from_pretrained`` of transformers reads.

    A StableEmbedding becomes a plain embedding with the same output. A GPT-2 without biases gets biases of zero,
    since the class always has them. The weights keep their dtype. Dropout takes no part in the logits; Llama has it
    in the attention only.

    Args:
        folder: a checkpoint, such as ``out/step-00000100``.
        out: folder to make; it must not exist yet, or be empty.

    Returns:
        ``out``, with config.json and model.safetensors, and with tokenizer.json, tokenizer_config.json and
        chat_template.jinja where the checkpoint has them.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged, or the folder cannot be written.
        ConfigurationError: if transformers has no class for this model, or ``out`` is not empty.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder, out = Path(folder), Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigurationError(f"{out} is there already, and is not an empty folder: give another place.")
    model = checkpoint.load_for_inference(folder)
    layout = choose_layout(model.config)
    end, texts = export_tokenizer(folder, model.config.block_size)
    texts[CONFIG] = to_json(
        their_config(layout, model.config)
        | {"torch_dtype": str(model.head.weight.dtype).removeprefix("torch.")}
        | {"bos_token_id": end, "eos_token_id": end}  # said also where there is none: the classes have defaults
    )
    tensors = their_tensors(layout, model)
    try:
        with new_folder(Path(os.path.realpath(out))) as add:  # "." has no name
            add(WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
            for name, content in texts.items():
                add(name, partial(Path.write_bytes, data=content))
    except (OSError, SafetensorError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{out} could not be written: {reason}. Make room, or give another place.") from error
    return out


def their_config(layout: Layout, config: GPTConfig) -> dict[str, Any]:
    """Return what their config.json says of the model."""
    resolved = replace(config, n_kv_head=config.kv_heads, intermediate_size=config.hidden_size)
    fields = {theirs: getattr(resolved, ours) for ours, (theirs, _) in layout.fields.items()}
    fixed = {theirs: values[0] for theirs, values in layout.fixed.items() if values[0] is not None}
    if layout is GPT2:
        more: dict[str, Any] = {"embd_pdrop": config.dropout, "attn_pdrop": config.dropout}
    else:
        more = {"mlp_bias": config.bias, "head_dim": config.head_size, "attention_dropout": config.dropout}
    return {"architectures": [layout.architecture], "model_type": layout.model_type} | fields | fixed | more


def their_tensors(layout: Layout, model: GPT) -> dict[str, Tensor]:
    """Return the weights under their names and in their shapes; a tied one once, as the embedding."""
    config = replace(model.config, bias=True) if layout is GPT2 else model.config
    own = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, shape in our_shapes(config):
        tensor = own[name] if name in own else torch.zeros(shape, dtype=model.head.weight.dtype)
        sizes = [part[0] for part in their_shapes(layout, config, name, shape)]
        parts = [tensor.t()] if is_transposed(layout, name) else tensor.split(sizes)
        for theirs, part in zip(their_names(layout, name), parts, strict=True):
            prefix = "" if theirs.startswith("lm_head.") else layout.prefix
            tensors[prefix + theirs] = part.clone(memory_format=torch.contiguous_format)
    return tensors


def export_tokenizer(folder: Path, block_size: int) -> tuple[int | None, dict[str, bytes]]:
    """Return the id that ends a document and the tokenizer's files by name; None and no files without a tokenizer."""
    if checkpoint.load_config(folder)["tokenizer"] not in (ByteTokenizer.name, FILE):
        logger.info("export: the checkpoint has no tokenizer, so there is none in the folder")
        return None, {}
    tokenizer = load_tokenizer(folder)
    if isinstance(tokenizer, FileTokenizer):
        content, end = tokenizer.content, tokenizer.tokenizer.id_to_token(tokenizer.end_of_document)
    else:
        content, end = byte_tokenizer(), END
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,  # a document follows the end of another, as in GPT-2
        "eos_token": end,
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    texts = {FILE: content, "tokenizer_config.json": to_json(settings)}
    if (folder / TEMPLATE).is_file():
        texts[TEMPLATE] = files.read_file(folder / TEMPLATE)
    return tokenizer.end_of_document, texts


def byte_tokenizer() -> bytes:
    """Return a tokenizer.json that encodes text as its bytes: a byte-level encoding without any merge."""
    # The library writes each byte as a character that can be printed; the others as those from 256 on, in order.
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    characters = {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return to_json(
        {
            "version": "1.0",
            "added_tokens": [{"id": ByteTokenizer.end_of_document, "content": END} | flags],
            "pre_tokenizer": level,
            "decoder": level,
            "model": {"type": "BPE", "vocab": {characters[byte]: byte for byte in range(256)}, "merges": []},
        }
    )


def to_json(content: Any) -> bytes:
    """Return indented JSON, with an end of line."""
    return (json.dumps(content, indent=2) + "\n").encode()


# in --------------------------------------------------------------------------------------------------------------


def import_huggingface(folder: str | Path, out: str | Path) -> Path:
    """Make a checkpoint of ours from a folder that ``save_pretrained`` of transformers wrote.

    Its update is 0 and it has no optimizer state, so a run that starts from it starts its optimizer and schedule
    afresh. The weights become float32, which holds float16 and bfloat16 exactly.

    Args:
        folder: config.json of a GPT-2 or a Llama, with model.safetensors or its shards and their index; a
            tokenizer.json and its chat template are taken along.
        out: where checkpoints go; it gets ``step-00000000``.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: if files are missing, damaged or do not fit each other, or ``out`` has such a checkpoint.
        ConfigurationError: if reference.GPT cannot express the model; it names the field.
    """
    folder, target = Path(folder), checkpoint.step_folder(Path(out), 0)
    files.require_utf8(folder)
    if target.exists():
        raise CheckpointError(f"{target} is there already: give another directory.")
    layout, config = our_config(folder / CONFIG)
    tensors = our_tensors(folder, layout, config)
    more, tokenizer, end = {}, None, None
    if (path := folder / FILE).is_file():
        content, tokenizer = files.read_file(path), FILE
        if content == byte_tokenizer():  # of one of our exports: data of plain bytes has its ids
            tokenizer = ByteTokenizer.name
        else:
            more[FILE] = content
            end = end_token(folder, content)
            if (template := template_in(folder, config_in(folder))) is not None:
                more[TEMPLATE] = template.encode(errors="replace")
    state: dict[str, Any] = {"update": 0, "optimizer": None, "optimizer_class": None, "precision": {}}
    state["stable_embedding"] = False
    plain: dict[str, Any] = {"model": as_plain(config), "train": as_plain(TrainConfig()), "tokenizer": tokenizer}
    plain |= {} if end is None else {"end_of_document": end}
    checkpoint.save(target, tensors, state, plain, more)
    return target


def end_token(folder: Path, content: bytes) -> int:
    """Return the id that ends a document: of a usual name, or else what config.json calls ``eos_token_id``.

    Raises:
        ConfigurationError: if it is not a tokenizer.json, or has neither.
    """
    said = read_json(folder / CONFIG).get("eos_token_id")
    first = said[0] if isinstance(said, list) and said else said
    try:
        return FileTokenizer(content, str(folder / FILE)).end_of_document
    except ConfigurationError:
        if not isinstance(first, int):
            raise
        return FileTokenizer(content, str(folder / FILE), first).end_of_document


def our_config(path: Path) -> tuple[Layout, GPTConfig]:
    """Return what a config.json of transformers means.

    Raises:
        CheckpointError: if it is missing or damaged.
        ConfigurationError: if it says something that GPTConfig has no field for.
    """
    given = read_json(path)
    kind = given.get("model_type")
    if kind not in list(LAYOUTS):  # a list: what stands there may be unhashable
        raise ConfigurationError(f"model_type in {path} is {kind!r}, but only {' and '.join(LAYOUTS)} can be read.")
    layout = LAYOUTS[kind]
    for name, values in layout.fixed.items():
        require(path, name, given.get(name, values[0]), values)
    if layout is not GPT2:
        given["rope_theta"] = rope_theta(path, given)
    hints = get_type_hints(GPTConfig)
    fields = dict(layout.shape)
    for ours, (theirs, default) in layout.fields.items():
        value = given.get(theirs, default)
        infinite = hints[ours] is float and isinstance(value, int | float) and not abs(value) <= FINITE
        if not allows(hints[ours], value) or infinite:
            said = "is missing" if value is ... else f"is {value!r}"
            raise ConfigurationError(f"{theirs} in {path} {said}, but must be {in_words(hints[ours])} ({ours} here).")
        fields[ours] = float(value) if hints[ours] is float else value
    config = GPTConfig(**fields)
    if layout is not GPT2:
        require(path, "mlp_bias", given.get("mlp_bias", False), (config.bias,))
        require(path, "head_dim", given.get("head_dim"), (None, config.head_size))
    elif any(given.get(name, 0.1) != config.dropout for name in ("embd_pdrop", "attn_pdrop")):
        logger.info("import: embd_pdrop and attn_pdrop become %s, as resid_pdrop: there is one dropout", config.dropout)
    return layout, config


def rope_theta(path: Path, given: Mapping[str, Any]) -> Any:
    """Return the base of the rotary wavelengths, from where the releases of transformers put it.

    Raises:
        ConfigurationError: if they are scaled, or turn a part of each head only.
    """
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigurationError(f"rope_parameters in {path} is {rope!r}, but must be an object.")
    require(path, "rope_type", rope.get("rope_type", rope.get("type", "default")), ("default",))
    partial = rope.get("partial_rotary_factor", given.get("partial_rotary_factor"))
    require(path, "partial_rotary_factor", partial, (None, 1.0))
    return rope.get("rope_theta", given.get("rope_theta", 10000.0))


def require(path: Path, name: str, value: Any, values: tuple[Any, ...]) -> None:
    """Raise ConfigurationError if a field has none of the values that we can express."""
    if value not in values:
        choices = " or ".join(repr(choice) for choice in values)
        raise ConfigurationError(f"{name} in {path} is {value!r}, but reference.GPT can express {choices} only.")


def our_tensors(folder: Path, layout: Layout, config: GPTConfig) -> dict[str, Tensor]:
    """Return the weights under our names, float32; all are checked before the first is read.

    Raises:
        CheckpointError: if one is missing, damaged, of another shape or dtype, or not one of the model's.
    """
    slices = {name.removeprefix(layout.prefix): part for name, part in open_tensors(folder).items()}
    unused = {name for name in slices if not re.fullmatch(layout.ignored, name)}
    plan: dict[str, tuple[str, ...]] = {}
    for name, shape in our_shapes(config):
        plan[name] = their_names(layout, name)
        for theirs, wanted in zip(plan[name], their_shapes(layout, config, name, shape), strict=True):
            check_tensor(folder, theirs, slices.get(theirs), wanted)
            unused.discard(theirs)
    tensors: dict[str, Tensor] = {}
    for name, parts in plan.items():
        whole = torch.cat([slices[part][:].float() for part in parts])
        tensors[name] = whole.t().contiguous() if is_transposed(layout, name) else whole
    if config.tie_embeddings:
        tensors["head.weight"] = tensors["embedding.weight"]
        if "lm_head.weight" in unused and torch.equal(slices["lm_head.weight"][:].float(), tensors["head.weight"]):
            unused.remove("lm_head.weight")  # some releases write a tied head too
    if unused:
        raise CheckpointError(
            f"{folder} has tensors that the model of its {CONFIG} does not have ({', '.join(sorted(unused)[:3])}): "
            "give the folder of a GPT2LMHeadModel or LlamaForCausalLM, as it was saved."
        )
    return tensors


def open_tensors(folder: Path) -> dict[str, Any]:
    """Return a handle of each tensor by its name, to ask for shape and dtype, and to read it with ``[:]``.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        if not (folder / INDEX).is_file():
            raise CheckpointError(
                f"{folder} has neither {WEIGHTS} nor {INDEX}: save the model with save_pretrained() of a recent "
                "transformers. Pickled weights (pytorch_model.bin) are not read, since they can hold code."
            )
        shards = read_json(folder / INDEX).get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else []
        # A name with a path in it would read files elsewhere.
        if not names or not all(isinstance(n, str) and re.fullmatch(r"[\w.-]+\.safetensors", n) for n in names):
            raise CheckpointError(f"weight_map in {folder / INDEX} does not map tensors to files of this folder.")
    handles: dict[str, Any] = {}
    for path in (folder / name for name in sorted(set(names))):
        try:
            file = safe_open(path, framework="pt")
            handles |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 # not a dict
        except (SafetensorError, OSError) as error:
            reason = first_line(error)
            raise CheckpointError(f"{path} is missing or damaged ({reason}): fetch it again.") from error
    return handles


def check_tensor(folder: Path, name: str, part: Any, wanted: tuple[int, ...]) -> None:
    """Raise CheckpointError if a tensor is not there (None), or has another shape or dtype than ``wanted``."""
    if part is None:
        raise CheckpointError(
            f"{folder} has no tensor {name}, but {CONFIG} demands it: the files do not belong together."
        )
    shape, dtype = tuple(part.get_shape()), part.get_dtype()
    if shape != wanted:
        raise CheckpointError(f"{name} in {folder} has the shape {shape}, but {CONFIG} demands {wanted}.")
    if dtype not in WEIGHT_TYPES:
        raise CheckpointError(
            f"{name} in {folder} has the dtype {dtype}, but only {', '.join(sorted(WEIGHT_TYPES))} are read: "
            "save the model unquantised."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        CheckpointError: if it is missing, damaged or holds something else.
    """
    try:
        return files.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}).") from error
