"""AdamW with 8-bit moments: the state of bitsandbytes' AdamW8bit, and one launch for all tensors on CUDA.

A small launch before it counts the step. Elsewhere plain PyTorch computes the same, slowly. How a moment becomes one
byte is in dynamic_map, how the launch works in adamw8bit_kernel.
"""

import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from reference.optimizers.dynamic_map import BLOCK, decode, dynamic_map, encode

logger = logging.getLogger("reference")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WRAPPED = "__bnb_optimizer_quant_state__"  # under this key bitsandbytes hides the moments from FSDP's gathering


Closure = Callable[[], float] | None


class Work(NamedTuple):
    """One tensor to update: what this rank holds of it, and the index of its group."""

    group: int
    parameter: Tensor
    gradient: Tensor
    state: dict[str, Any]


class AdamW8bit(Optimizer):
    """AdamW with decoupled weight decay and 8-bit moments.

    Args:
        params: float32, bfloat16 or float16 tensors of any shape, without gaps in memory; gradients of these dtypes.
            Of a DTensor (FSDP2) and of a flat parameter (FSDP1) each rank updates the part that it holds, and saves
            the state of that part: 8-bit state can be neither gathered nor resharded.
        lr: a plain number per group, which a schedule may change.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: times the learning rate, the share that each parameter loses per step.
        min_8bit_size: tensors with fewer elements (on this rank) keep 32-bit moments.
        keep_32bit: tensors of ``params`` that keep 32-bit moments whatever their size, as bitsandbytes'
            StableEmbedding asks for. It holds for this optimizer only; bitsandbytes' GlobalOptimManager is not read.

    State per tensor: ``step``, a float32 scalar; ``state1`` and ``state2``, uint8 of the tensor's shape; ``absmax1``
    and ``absmax2``, float32 ``[ceil(elements / 256)]``; ``qmap1`` and ``qmap2``, float32 ``[256]``. With 32-bit moments
    ``state1`` and ``state2`` are float32, and the others are missing. ``state_dict`` and ``load_state_dict`` exchange
    it with bitsandbytes' AdamW8bit (0.50) in both directions.

    A ``found_inf`` other than 0 (set by torch's GradScaler, or by whoever guards the step) leaves everything as it is,
    without waiting for the device.

    Raises:
        ValueError: settings out of range; in ``step``, a tensor that it cannot update.
    """

    _step_supports_amp_scaling = True  # torch's GradScaler leaves grad_scale and found_inf to this step

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        keep_32bit: Iterable[Tensor] = (),
    ) -> None:
        not_plain = any(isinstance(number, Tensor) for number in (lr, eps, weight_decay, *betas))
        if not_plain or min(lr, eps, weight_decay) < 0 or not 0 <= min(betas) <= max(betas) < 1:
            raise ValueError(
                "AdamW8bit needs lr, eps and weight_decay as plain numbers of at least 0 and betas in [0, 1), not "
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}."
            )
        self.launches: dict[torch.device, tuple[Any, Any]] = {}  # what they were made from, and what the kernel reads
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "min_8bit_size": min_8bit_size}
        super().__init__(params, defaults)
        owned = {id(p) for p in self.parameters()}
        for p in keep_32bit:
            if id(p) not in owned:
                raise ValueError("keep_32bit names a tensor that is not among params: name only tensors of params.")
            self.state[p] = fresh_state(local_part(p), wide=True)

    def parameters(self) -> list[Tensor]:
        """Return all parameters, group by group."""
        return [p for group in self.param_groups for p in group["params"]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.launches = {}
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("min_8bit_size", 4096)  # bitsandbytes keeps it outside its groups

    def state_dict(self) -> dict[str, Any]:
        """Return groups and state in bitsandbytes' form. Waits for the device, which counts the steps."""
        saved = super().state_dict()
        for key, entry in saved["state"].items():
            moments = {name: value for name, value in entry.items() if name != "step"}
            saved["state"][key] = {"step": int(entry["step"]), WRAPPED: moments}
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what AdamW8bit or bitsandbytes' AdamW8bit saved.

        Raises:
            ValueError: groups or moments that do not fit the parameters. Nothing has been changed then.
        """
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        saved = {p: (key, state_dict["state"].get(key)) for p, key in zip(self.parameters(), keys, strict=False)}
        state = {p: loaded_state(local_part(p), entry, key) for p, (key, entry) in saved.items() if entry}
        # torch checks the groups. It gets no state, because it would cast the codes to the parameter's dtype.
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(state)

    @torch.no_grad()
    def step(self, closure: Closure = None) -> float | None:  # type: ignore[override] # torch's overloads say no more
        """Update all parameters that have a gradient; return what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work: dict[torch.device, list[Work]] = {}
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is None or not (local := local_part(p)).numel():
                    continue
                if not self.state[p]:
                    self.state[p] = fresh_state(local, wide=local.numel() < group["min_8bit_size"])
                item = Work(number, local, local_gradient(p, local), self.state[p])
                work.setdefault(local.device, []).append(item)
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for device, items in work.items():
            if has_kernel(device):
                self.launch(device, items, found_inf, grad_scale)
            elif found_inf is None or not found_inf.item():
                self.compute(items, 1.0 if grad_scale is None else 1.0 / float(grad_scale))
        return loss

    def compute(self, items: list[Work], unscale: float) -> None:
        """Update in plain PyTorch. Every tensor is seen as it lies in memory, in one dimension."""
        for item in items:
            check(item)
        for number, parameter, gradient, state in items:
            group = self.param_groups[number]
            (beta1, beta2), lr = group["betas"], group["lr"]
            step = float(state["step"].add_(1))
            correction = math.sqrt(1 - beta2**step)
            p, g = flat(parameter), flat(gradient).float() * unscale
            state1, state2 = flat(state["state1"]), flat(state["state2"])
            if "absmax1" not in state:
                m = state1.mul_(beta1).add_((1 - beta1) * g)
                v = state2.mul_(beta2).add_((1 - beta2) * g * g)
            else:
                m = decode(state1, state["absmax1"] * beta1, signed=True) + (1 - beta1) * g
                v = decode(state2, state["absmax2"] * beta2, signed=False) + (1 - beta2) * g * g
                encode(m, state1, state["absmax1"], signed=True)
                encode(v, state2, state["absmax2"], signed=False)
            update = lr * correction / (1 - beta1**step) * (m / (v.sqrt() + group["eps"] * correction))
            p.copy_(p.float() * (1 - lr * group["weight_decay"]) - update)

    def launch(
        self, device: torch.device, items: list[Work], found_inf: Tensor | None, grad_scale: Tensor | None
    ) -> None:
        """Update by one launch per kind of tensor (dtypes and alignment): one, unless the model mixes kinds.

        Nothing waits for the device. At every step the addresses of the gradients travel there, which zero_grad drops,
        and a few numbers per group; all other addresses when one has changed.
        """
        from reference.optimizers.adamw8bit_kernel import launch_step, lay_out, to_device

        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("AdamW8bit reads its rates on the host, so a CUDA graph cannot capture its step.")
        made_from = [identity(item) for item in items]
        if self.launches.get(device, (None, None))[0] != made_from:
            for item in items:
                check(item)
            self.launches[device] = made_from, lay_out(made_from, device)
        groups = [(*group["betas"], group["lr"], group["eps"], group["weight_decay"]) for group in self.param_groups]
        settings = to_device(torch.tensor(groups, dtype=torch.float64), device)
        guards = None
        if found_inf is not None or grad_scale is not None:
            inf = torch.zeros((), device=device) if found_inf is None else found_inf
            scale = torch.ones((), device=device) if grad_scale is None else grad_scale
            guards = [guard.to(device, torch.float32, non_blocking=True) for guard in (inf, scale)]
        for launch in self.launches[device][1]:
            gradients = torch.tensor([items[index].gradient.data_ptr() for index in launch.members])
            launch_step(launch, to_device(gradients, device), settings, guards)


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """Return whether the kernel runs on this device; warn where only triton is missing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        logger.warning("AdamW8bit is slow here: install triton, which compiles its kernel.")
        return False
    return device.type == "cuda"


def identity(item: Work) -> tuple[Any, ...]:
    """Return what a launch depends on: six addresses (scales 0 if there are none), elements, group, and its kind."""
    number, p, g, state = item
    scales = (state["absmax1"].data_ptr(), state["absmax2"].data_ptr()) if "absmax1" in state else (0, 0)
    moments, elements = (state["state1"].data_ptr(), state["state2"].data_ptr()), p.numel()
    regular = elements % 8 == 0 and (p.data_ptr() | g.data_ptr() | moments[0] | moments[1]) % 16 == 0
    return (p.data_ptr(), *moments, *scales, state["step"].data_ptr(), elements, number, p.dtype, g.dtype, regular)


def check(item: Work) -> None:
    """Raise ValueError for what cannot be updated: the kernel writes wherever an address leads."""
    _, p, g, state = item
    dense = p.is_contiguous() or torch.empty_like(p).stride() == p.stride()
    if p.dtype not in DTYPES or g.dtype not in DTYPES or not dense:
        raise ValueError(
            f"AdamW8bit cannot update a parameter of {p.dtype}, shape {tuple(p.shape)} and strides {p.stride()} with "
            f"gradients of {g.dtype}: it needs float32, bfloat16 or float16, and tensors without gaps in memory."
        )
    if any(state[key].device != p.device or state[key].numel() != p.numel() for key in ("state1", "state2")):
        raise ValueError(
            f"The moments of a parameter of shape {tuple(p.shape)} on {p.device} have another device or size: build "
            "AdamW8bit after the model has moved, or load the state again."
        )


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a DTensor, and any other tensor as it is."""
    to_local = getattr(type(tensor), "to_local", None)
    return tensor if to_local is None else to_local(tensor)


def local_gradient(parameter: Tensor, local: Tensor) -> Tensor:
    """Return the gradient of what this rank holds, laid out in memory like it."""
    gradient = parameter.grad
    assert gradient is not None
    placements = [
        getattr(t, "placements", None) if hasattr(type(t), "to_local") else None for t in (parameter, gradient)
    ]
    if gradient.layout != torch.strided or placements[0] != placements[1]:
        raise ValueError("AdamW8bit needs dense gradients that are sharded like their parameters.")
    gradient = local_part(gradient)
    same = gradient.stride() == local.stride()
    return gradient if same else torch.empty_like(local, dtype=gradient.dtype).copy_(gradient)


def flat(tensor: Tensor) -> Tensor:
    """Return a tensor without gaps as it lies in memory, in one dimension."""
    return tensor.as_strided((tensor.numel(),), (1,))


def fresh_state(local: Tensor, wide: bool) -> dict[str, Any]:
    """Return the state before the first step, when both moments are zero; ``wide``: in 32 bits."""
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=local.device)}
    for index, signed, zero in (("1", True, 127), ("2", False, 0)):
        if wide:
            state[f"state{index}"] = torch.zeros_like(local, dtype=torch.float32)
            continue
        state[f"state{index}"] = torch.full_like(local, zero, dtype=torch.uint8)
        state[f"qmap{index}"] = dynamic_map(signed, local.device)
        state[f"absmax{index}"] = torch.zeros(-(-local.numel() // BLOCK), dtype=torch.float32, device=local.device)
    return state


def loaded_state(local: Tensor, saved: dict[str, Any], name: Any) -> dict[str, Any]:
    """Return a copy of a saved state, on the parameter's device and laid out like the parameter."""
    entry = {**saved, **saved.get(WRAPPED, {})}
    try:
        state = fresh_state(local, wide=entry["state1"].dtype == torch.float32)
        state["step"].fill_(entry["step"])
        for key in state.keys() - {"step"}:
            new, old = state[key], entry[key].to(local.device)
            if (old.dtype, old.numel()) != (new.dtype, new.numel()) or (key[0] == "q" and not torch.equal(old, new)):
                raise ValueError(f"{key} is {old.dtype} of {old.numel()} elements")
            if key[0] != "q":
                new.copy_(old.reshape(new.shape))
    except (KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"The saved state of parameter {name} is not that of AdamW8bit for {local.numel()} elements ({error!r}): "
            "load what AdamW8bit, this one or bitsandbytes', saved for the same parameters."
        ) from error
    return state
