"""Linear layers of bitsandbytes in place of nn.Linear, frozen: nf4, fp4 (both with or without -dq) and int8.

A layer's packed weight alone says nothing: bitsandbytes keeps scales and codes beside it, and its state dict has them
under names of their own, which its 4-bit layer writes and does not read (bitsandbytes 0.50.2).
"""

import copy
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reference.config import shown
from reference.errors import ConfigurationError, first_line
from reference.finetuning.config import Quantization

logger = logging.getLogger("reference")

BLOCK = 64  # weights that share a scale: bitsandbytes' default

# What the state dict of bitsandbytes' layers has beside weight and bias.
PACKED = re.compile(
    r"(.+)\.(?:weight\.(?:absmax|quant_map|nested_\w+|quant_state\.bitsandbytes__\w+)|SCB|weight_format)"
)


def quantise(module: nn.Module, names: list[str], kind: Quantization, dtype: torch.dtype) -> float:
    """Replace linear layers by quantised ones, in place, and return their relative error.

    Args:
        module: holds the layers, on the device that computes: a GPU's weights are quantised there.
        names: of the layers.
        kind: see FinetuneConfig.
        dtype: to compute in.

    Returns:
        The Frobenius norm of what the weights lost over that of the weights.

    Raises:
        ConfigurationError: if bitsandbytes is not installed, or would compute something else.
    """
    if kind == "int8":  # said once, instead of by bitsandbytes at every product
        logger.info("fine-tuning: int8 rounds the inputs of its layers to float16 and then to 8 bits")
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(is_news)
    lost = whole = 0.0
    for name in names:
        plain = module.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        layer = quantised(plain, kind, dtype)
        lost += float((dense(layer).float() - plain.weight.float()).square().sum())
        whole += float(plain.weight.float().square().sum())
        module.set_submodule(name, layer)
    return (lost / whole) ** 0.5 if whole else 0.0


def is_news(record: logging.LogRecord) -> bool:
    """Return False for what bitsandbytes logs at every product of an int8 layer."""
    return "inputs will be cast from" not in record.getMessage()


def quantised(plain: nn.Linear, kind: Quantization, dtype: torch.dtype) -> nn.Linear:
    """Return a frozen quantised layer with the weight and the bias of ``plain``, on its device."""
    try:
        from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
    except ImportError as error:
        raise ConfigurationError(
            f"quantize={kind!r} needs bitsandbytes ({first_line(error)}): pip install 'gpt-conformance[finetune]'."
        ) from error
    size, weight = (plain.in_features, plain.out_features), plain.weight.detach()
    layer: Any
    if kind != "int8" and weight.device.type == "cpu" and plain.in_features % BLOCK:
        # NOTE a footgun: bitsandbytes 0.50.2 then takes the scales of other blocks, and the weights come out wrong by a
        # quarter instead of a tenth, without an error (reports/findings/bitsandbytes-cpu-4bit-columns.py).
        raise ConfigurationError(
            f"quantize={kind!r} is wrong on the CPU for layers whose inputs are not a multiple of {BLOCK}, and one has "
            f"{plain.in_features}: choose int8 or none, or a GPU."
        )
    if kind == "int8":
        # NOTE a footgun: has_fp16_weights=True is the default, and quantises nothing that is kept.
        layer = Linear8bitLt(*size, bias=False, has_fp16_weights=False, device="meta")
        layer.weight = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(plain.weight.device)
    else:
        packing: dict[str, Any] = {"quant_type": kind[:3], "compress_statistics": kind.endswith("-dq")}
        layer = Linear4bit(*size, bias=False, compute_dtype=dtype, device="meta", **packing)
        layer.weight = Params4bit(weight, requires_grad=False, module=layer, **packing).to(plain.weight.device)
        # In evaluation it would pack the weights anew for processors with AVX512-BF16, in place.
        layer.support_avx512bf16_for_cpu = False
    if plain.bias is not None:
        # bitsandbytes turns it into the dtype of the computation at the first forward: here, so that nothing changes.
        layer.bias = nn.Parameter(plain.bias.detach().to(dtype), requires_grad=False)
    assert isinstance(layer, nn.Linear)
    return layer.train(plain.training)


def is_quantised(module: nn.Module) -> bool:
    """Return whether this is a quantised layer of bitsandbytes, told without importing the package."""
    kind = type(module)
    return kind.__name__ in ("Linear4bit", "Linear8bitLt") and kind.__module__.startswith("bitsandbytes.")


def dense(layer: nn.Module) -> Tensor:
    """Return the weight that a quantised layer computes with, float32."""
    state = {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}
    return dense_weights(state)["layer.weight"]


def dense_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with one float32 weight for each quantised layer, and without what was packed beside it.

    Raises:
        ConfigurationError: if what is packed, which may come from a forged file, does not fit together.
    """
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if found := PACKED.fullmatch(name):
            packed.setdefault(found[1], {})[name.removeprefix(f"{found[1]}.").removeprefix("weight.")] = tensor
    plain = {name: tensor for name, tensor in state.items() if not PACKED.fullmatch(name)}
    for layer, parts in packed.items():
        weight = plain[f"{layer}.weight"]
        if "SCB" in parts:  # each row's largest magnitude is 127
            plain[f"{layer}.weight"] = weight.float() * (parts["SCB"].float() / 127.0).unsqueeze(1)
        else:
            plain[f"{layer}.weight"] = unpacked(weight, parts, layer)
    return plain


def unpacked(weight: Tensor, parts: Mapping[str, Tensor], layer: str) -> Tensor:
    """Return a 4-bit weight as float32; ``parts`` are its scales and codes by bitsandbytes' names."""
    from bitsandbytes.functional import dequantize_4bit

    state = quant_state(parts, weight, layer)
    # NOTE a footgun: as one long row. On the CPU, bitsandbytes 0.50.2 takes the scales of other blocks if a row is not
    # a whole number of blocks, and such a layer may come from a GPU.
    flat = copy.copy(state)
    flat.shape = torch.Size((1, state.shape.numel()))
    whole: Tensor = dequantize_4bit(weight, flat)
    return whole.float().view(state.shape)


def quant_state(parts: Mapping[str, Tensor], weight: Tensor, layer: str) -> Any:
    """Return bitsandbytes' QuantState of what a state dict holds beside a packed weight.

    Raises:
        ConfigurationError: if it cannot be one, or does not fit the weight: kernels do not look, and would read beyond
            the end.
    """
    from bitsandbytes.functional import QuantState

    try:
        state = QuantState.from_dict(dict(parts), weight.device)
        size, scales = state.shape.numel(), state.absmax
        fits = [weight.dtype == torch.uint8, weight.numel() == -(-size // 2), state.code.numel() == 16]
        fits += [state.blocksize >= 1, scales.numel() == -(-size // state.blocksize)]
        if state.nested:
            inner = state.state2
            fits += [scales.dtype == torch.uint8, inner.blocksize >= 1, inner.code.numel() == 256]
            fits.append(inner.absmax.numel() == -(-scales.numel() // inner.blocksize))
        else:
            fits.append(scales.dtype == torch.float32)
    except Exception as error:  # of tensors that were forged, anything
        raise ConfigurationError(f"the scales of {layer} cannot be read ({shown(first_line(error))})") from error
    if not all(fits):
        raise ConfigurationError(f"the scales of {layer} do not fit its packed weight of {weight.numel()} bytes")
    return state


def without_packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the scales and codes: their sizes are bitsandbytes' own affair."""
    return {name: tensor for name, tensor in state.items() if not PACKED.fullmatch(name)}


@torch.no_grad()
def load_packed(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what ``without_packed`` leaves out: the scales and codes of a module's quantised layers, in place.

    Raises:
        ConfigurationError: if they, which may come from a forged file, do not fit.
    """
    for name, layer in module.named_modules():
        if not is_quantised(layer):
            continue
        own: Any = layer
        parts = {
            entry.removeprefix(f"{name}.").removeprefix("weight."): tensor.clone()
            for entry, tensor in state.items()
            if entry.startswith(f"{name}.") and PACKED.fullmatch(entry)
        }
        if type(layer).__name__ == "Linear8bitLt":
            holder = own.state if own.weight.SCB is None else own.weight  # it moves there at the first forward
            if parts["SCB"].shape != holder.SCB.shape:
                raise ConfigurationError(f"the scales of {name} do not fit its {len(holder.SCB)} rows")
            holder.SCB.copy_(parts["SCB"])
            continue
        state_of = quant_state(parts, own.weight, name)
        if tuple(state_of.shape) != (own.out_features, own.in_features):
            raise ConfigurationError(f"{name} has the shape {tuple(state_of.shape)} there")
        own.weight.quant_state = own.quant_state = state_of
