"""What a step of AdamW8bit and of GrokAdamW costs on a GPU, beside torch, bitsandbytes, torchao and the package.

``python -m tests.measure.optimizer_steps --write FILE [--rows PART]``: device time of each step by CUDA events, with
the L2 cache flushed before it and the device held back until the host has launched everything; the host's own time; the
bytes of the state; the share of codes that equal bitsandbytes' from equal state; an update of GPT-2 124M with each.
"""

import argparse
import contextlib
import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference import GPT, GPTConfig
from reference.optimizers.adamw8bit import AdamW8bit
from reference.optimizers.grokadamw import GrokAdamW

SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
SIZES: dict[str, Callable[[], GPTConfig]] = {"gpt2-124m": GPTConfig.gpt2, "llama-1.2b": GPTConfig.llama}
ROUNDS = 25
HELD = 8e-3  # seconds in which the host launches a step


class Clock:
    """Device time of a call."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.sweep = torch.randint(2**31, (cache // 2,), dtype=torch.int32, device="cuda")  # twice the cache

    def __call__(self, work: Callable[[], Any], rounds: int = ROUNDS, held: float = HELD) -> dict[str, float]:
        """Median and quartiles of the device's milliseconds, and the median of the host's."""
        work()
        device, host = [], []
        for _ in range(rounds):
            self.sweep.bitwise_not_()
            torch.cuda.synchronize()
            torch.cuda._sleep(int(held * 2e9))
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            began = time.perf_counter()
            work()
            host.append(1e3 * (time.perf_counter() - began))
            end.record()
            torch.cuda.synchronize()
            device.append(start.elapsed_time(end))
        low, middle, high = statistics.quantiles(device, n=4) if rounds > 1 else device * 3
        return {"device_ms": middle, "quartiles_ms": [low, high], "host_ms": statistics.median(host)}


def copy_bandwidth(clock: Clock) -> float:
    """Bytes per second that a copy on the device reads and writes."""
    source = torch.randint(2**31, (2**30,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / clock(lambda: target.copy_(source))["device_ms"] * 1e3


def shaped_like(size: str, dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters of a preset's shapes."""
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in GPT(SIZES[size]()).parameters()]
    return [nn.Parameter(torch.randn(shape, device="cuda").mul_(0.02).to(dtype)) for shape in shapes]


def gradients_like(tensors: list[nn.Parameter]) -> list[Tensor]:
    """Gradients whose rows differ in size."""
    sizes = [torch.rand(tensor.shape[:1] + (1,) * (tensor.ndim - 1), device="cuda") for tensor in tensors]
    return [torch.randn_like(t) * (1e-3 * size).to(t.dtype) for t, size in zip(tensors, sizes, strict=True)]


def give(tensors: list[nn.Parameter], gradients: list[Tensor]) -> None:
    """Set the gradients."""
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient


def state_bytes(optimizer: Any) -> int:
    """Bytes of all tensors of the state, each storage once."""
    groups = [group["state"].values() for group in optimizer.param_groups if "state" in group]  # grokadamw's own place
    entries = [*optimizer.state.values(), *(entry for group in groups for entry in group)]
    found: dict[int, int] = {}
    left = [value for entry in entries for value in entry.values() if isinstance(value, Tensor)]
    while left:
        tensor: Any = left.pop()
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's tensors are made of others
            left += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def measure_steps(clock: Clock, bandwidth: float, size: str, dtype: torch.dtype, part: str) -> dict[str, Any]:
    """One row per optimizer whose name has ``part`` in it, for parameters and gradients of one dtype."""
    import bitsandbytes
    from grokadamw.grokadamw import GrokAdamW as PackageGrokAdamW

    torch.manual_seed(0)
    tensors = shaped_like(size, dtype)
    gradients = [gradients_like(tensors), gradients_like(tensors)]
    elements, width = sum(tensor.numel() for tensor in tensors), tensors[0].element_size()
    like, eight = 7 * width, 3 * width + 4 + 16 / 256  # bytes per parameter, as in conformance.bench
    rows: dict[str, tuple[Callable[[], Any], float, int]] = {
        "torch AdamW fused": (lambda: torch.optim.AdamW(tensors, fused=True, **SETTINGS), like, ROUNDS),
        "AdamW8bit": (lambda: AdamW8bit(tensors, **SETTINGS), eight, ROUNDS),
        "AdamW8bit, guarded": (lambda: AdamW8bit(tensors, **SETTINGS), eight, ROUNDS),
        "AdamW8bit, new gradients each step": (lambda: AdamW8bit(tensors, **SETTINGS), eight, ROUNDS),
        "bitsandbytes AdamW8bit": (lambda: bitsandbytes.optim.AdamW8bit(tensors, **SETTINGS), eight, ROUNDS),
        "GrokAdamW": (lambda: GrokAdamW(tensors, **SETTINGS), 9 * width, ROUNDS),
    }
    if size == "gpt2-124m":
        rows["GrokAdamW of the package"] = (lambda: PackageGrokAdamW(tensors, **SETTINGS), 9 * width, 3)
        with contextlib.suppress(ImportError):
            from torchao.optim import AdamW8bit as TorchaoAdamW8bit

            rows["torchao AdamW8bit"] = (lambda: TorchaoAdamW8bit(tensors, **SETTINGS), eight, 5)
    found: dict[str, Any] = {}
    for name, (build, traffic, rounds) in rows.items():
        if part not in name:
            continue
        give(tensors, gradients[0])
        optimizer = build()
        if "guarded" in name:
            optimizer.found_inf = torch.zeros((), device="cuda")
        turn = iter(range(10**6))

        def step(optimizer: Any = optimizer, turn: Any = turn, name: str = name) -> None:
            if "new gradients" in name:
                give(tensors, gradients[next(turn) % 2])
            optimizer.step()

        try:
            for update in range(3):
                give(tensors, gradients[update % 2])
                optimizer.step()
            give(tensors, gradients[0])
            row = clock(step, rounds)
        except Exception as error:  # what a peer cannot do is a row, too
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            print(size, dtype, name, found[name], flush=True)
            continue
        floor = 1e3 * elements * traffic / bandwidth
        found[name] = row | {"share_of_floor": floor / row["device_ms"], "state_bytes": state_bytes(optimizer)}
        print(
            size, dtype, name, {key: value for key, value in found[name].items() if key != "quartiles_ms"}, flush=True
        )
        del optimizer, step
        torch.cuda.empty_cache()
    return found


def equal_codes(size: str) -> dict[str, float]:
    """The share of codes that AdamW8bit and bitsandbytes find alike, and the largest difference of a parameter."""
    import bitsandbytes

    torch.manual_seed(1)
    tensors = shaped_like(size, torch.float32)
    ours = AdamW8bit(tensors, **SETTINGS)
    for _ in range(10):
        give(tensors, gradients_like(tensors))
        ours.step()
    copies = [nn.Parameter(tensor.detach().clone()) for tensor in tensors]
    theirs = bitsandbytes.optim.AdamW8bit(copies, **SETTINGS)
    theirs.load_state_dict(ours.state_dict())
    gradients = gradients_like(tensors)
    give(tensors, gradients)
    give(copies, gradients)
    ours.step()
    theirs.step()
    equal: dict[str, list[int]] = {"state1": [0, 0], "state2": [0, 0]}
    for tensor, copy in zip(tensors, copies, strict=True):
        for key, counts in equal.items():
            codes = ours.state[tensor][key]
            if codes.dtype == torch.uint8:
                counts[0] += int((codes == theirs.state[copy][key]).sum())
                counts[1] += codes.numel()
    return {key: same / total for key, (same, total) in equal.items()}


def measure_updates(rounds: int = 6, updates: int = 12, batch: int = 32) -> dict[str, Any]:
    """Milliseconds of whole updates of GPT-2 124M, bf16 autocast, compiled, with each optimizer in turn."""
    import bitsandbytes

    torch.manual_seed(0)
    config = GPTConfig.gpt2()
    model: Any = GPT(config).to("cuda")
    ids = torch.randint(config.vocab_size, (batch, config.block_size + 1), device="cuda")

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())

    compiled = torch.compile(loss_of)
    tensors = list(model.parameters())
    optimizers: dict[str, Any] = {
        "torch AdamW fused": torch.optim.AdamW(tensors, fused=True, **SETTINGS),
        "AdamW8bit": AdamW8bit(tensors, **SETTINGS),
        "bitsandbytes AdamW8bit": bitsandbytes.optim.AdamW8bit(tensors, **SETTINGS),
    }

    def run(optimizer: Any, count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            compiled(ids[:, :-1], ids[:, 1:]).backward()
            optimizer.step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / count

    for optimizer in optimizers.values():
        run(optimizer, 4)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            times[name].append(run(optimizer, updates))
    found: dict[str, Any] = {
        name: {"update_ms": statistics.median(values), "all_ms": values} for name, values in times.items()
    }
    found["tokens_per_update"] = batch * config.block_size
    for name, values in times.items():
        print("update", name, statistics.median(values), flush=True)
    return found


def machine() -> dict[str, Any]:
    """Return what the figures hold for."""
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    versions = {}
    for name in ("torch", "triton", "bitsandbytes", "grokadamw", "torchao"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "driver and power limit": driver,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
    }


def main() -> None:
    """Measure all, and write after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--rows", default="", help="only optimizers with this in their name, and no whole updates")
    arguments = parser.parse_args()
    path: Path = arguments.write
    clock = Clock()
    results: dict[str, Any] = {"machine": machine(), "settings": SETTINGS, "rounds": ROUNDS}
    results["copy_bytes_per_second"] = bandwidth = copy_bandwidth(clock)
    print(f"copy {bandwidth / 1e9:.0f} GB/s", flush=True)
    results["optimizer step"] = {}
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            key = f"{size}, {str(dtype).removeprefix('torch.')}"
            results["optimizer step"][key] = measure_steps(clock, bandwidth, size, dtype, arguments.rows)
            torch.cuda.empty_cache()
            path.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.rows:
        return
    results["codes equal to bitsandbytes'"] = {"gpt2-124m": equal_codes("gpt2-124m")}
    print(results["codes equal to bitsandbytes'"], flush=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    results["update of gpt2-124m, bf16-mixed, compiled"] = measure_updates()
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
