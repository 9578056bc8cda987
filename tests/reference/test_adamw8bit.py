"""AdamW8bit against a float64 model of it, against bitsandbytes, and against itself saved, skipped and sharded.

Every test of the step runs in plain PyTorch, on a GPU where there is one, and in Triton's interpreter where
TRITON_INTERPRET=1 asks for it (triton reads it when it is imported).
"""

import copy
import io
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference.optimizers import adamw8bit
from reference.optimizers.adamw8bit import AdamW8bit
from reference.optimizers.dynamic_map import BLOCK, code_table, dynamic_map, midpoints, nearest

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(64, 64), (4097,), (70, 111), (5, 7, 131), (13,), (3, 1), ()]  # eight-bit and odd, eight-bit, 32-bit, scalar


@pytest.fixture(params=["plain", "interpreted", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where the step runs, and by which of its two ways."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        yield torch.device("cuda", torch.cuda.current_device())
        return
    if request.param == "interpreted":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("needs triton, and TRITON_INTERPRET=1 in the environment")
        monkeypatch.setattr(adamw8bit, "has_kernel", lambda _: True)
    yield CPU


def drawn(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers whose rows differ in size by decades, as gradients do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (3 * torch.rand([*shape[:1], *[1] * (len(shape) - 1)], generator=generator) - 3)
    return (torch.randn(shape, generator=generator) * scale * sizes).to(dtype)


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(drawn(*shape, seed=i, scale=0.1).to(device, dtype)) for i, shape in enumerate(SHAPES)]


def give_gradients(tensors: list[Any], update: int, dtype: torch.dtype | None = None) -> None:
    """The same gradients for the same update, at new addresses."""
    for i, tensor in enumerate(tensors):
        tensor.grad = None
        gradient = drawn(*tensor.shape, seed=1000 * update + i, scale=0.01)
        with warnings.catch_warnings():  # gradients of another dtype are what some engines leave in .grad
            warnings.simplefilter("ignore")
            tensor.grad_dtype = None if dtype else tensor.dtype
            tensor.grad = gradient.to(tensor.device, dtype or tensor.dtype)


class Model:
    """AdamW with 8-bit moments in float64: what the step should compute."""

    def __init__(self, tensor: Tensor, gradient: Tensor, state: dict[str, Any]) -> None:
        step, elements = int(state["step"]) + 1, tensor.numel()
        (beta1, beta2), lr, eps = SETTINGS["betas"], SETTINGS["lr"], SETTINGS["eps"]
        m, v = (self.decoded(state, index, elements) for index in ("1", "2"))
        g = gradient.double().cpu().reshape(-1)
        terms = beta1 * m.abs() + (1 - beta1) * g.abs()  # what rounding errors are relative to
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        self.moved, self.terms = (
            lr / (1 - beta1**step) * x / ((v / (1 - beta2**step)).sqrt() + eps) for x in (m, terms)
        )
        self.parameter = tensor.double().cpu().reshape(-1) * (1 - lr * SETTINGS["weight_decay"]) - self.moved
        self.moments, self.scales, self.codes = (m, v), [], []
        for moment, signed in ((m, True), (v, False)):
            blocks = nn.functional.pad(moment, (0, -elements % BLOCK)).view(-1, BLOCK)
            scale = blocks.abs().amax(1).clamp(min=2.0**-126)
            parts = (blocks / scale[:, None]).reshape(-1)[:elements]
            distances = (parts[:, None] - dynamic_map(signed, CPU).double()).abs()
            self.scales.append(scale)
            self.codes.append(distances.argmin(1))

    @staticmethod
    def decoded(state: dict[str, Any], index: str, elements: int) -> Tensor:
        saved = state[f"state{index}"].cpu().reshape(-1)
        if saved.dtype == torch.float32:
            return saved.double()
        scales = state[f"absmax{index}"].cpu().double().repeat_interleave(BLOCK)[:elements]
        return dynamic_map(index == "1", CPU).double()[saved.long()] * scales


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


# -- the map ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_bitsandbytes_own(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed, CPU), functional.create_dynamic_map(signed=signed))


def probes(signed: bool) -> Tensor:
    """Floats where a code can go wrong: about every midpoint, about every value, tiny, zero, and many at random."""
    near = torch.cat([midpoints(signed, CPU), dynamic_map(signed, CPU)])
    up, down = (torch.nextafter(near, torch.tensor(end)) for end in (9.0, -9.0))
    drawn = 10 ** (-10 * torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    all_of_them = torch.cat([near, up, down, drawn, torch.tensor([0.0, -0.0, 1.0, 1.0000001, 1e-45, torch.inf])])
    return torch.cat([all_of_them, -all_of_them]) if signed else all_of_them[all_of_them >= 0]


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_the_nearest_exactly(signed: bool) -> None:
    floats = probes(signed)
    floats = floats[floats.isfinite()]
    distances = (floats.double()[:, None] - dynamic_map(signed, CPU).double()).abs()
    found = nearest(floats, signed).long()
    assert torch.equal(distances.gather(1, found[:, None])[:, 0], distances.amin(1))


@pytest.mark.parametrize("signed", [True, False])
def test_the_kernels_table_gives_the_same_codes(signed: bool) -> None:
    floats = torch.cat([probes(signed), torch.tensor([torch.nan])])
    table, shift = code_table(signed, CPU), 17 if signed else 16
    bits = floats.view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF) if signed else bits
    codes = (table[(bits >> shift).long() + len(table) // 2] + bits) >> shift
    assert torch.equal(codes, nearest(floats, signed).int())
    assert codes.min() == 0
    assert codes.max() == 255


# -- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_step_is_that_of_the_float64_model(
    device: torch.device, dtype: torch.dtype, gradient_dtype: torch.dtype
) -> None:
    tensors = parameters(device, dtype)
    optimizer = AdamW8bit(tensors, **SETTINGS)
    for update in range(4):
        before = [tensor.detach().clone() for tensor in tensors]
        states = [snapshot(optimizer.state[tensor]) for tensor in tensors]
        give_gradients(tensors, update, gradient_dtype)
        optimizer.step()
        for tensor, old, old_state in zip(tensors, before, states, strict=True):
            state = optimizer.state[tensor]
            if not old_state:
                old_state = adamw8bit.fresh_state(old, wide=state["state1"].dtype == torch.float32)
            assert tensor.grad is not None
            model = Model(old, tensor.grad, old_state)
            seen = tensor.detach().cpu().reshape(-1)
            # Half a step of the dtype for rounding; a whole one in the interpreter, which cuts bfloat16 off.
            steps = 1.01 if adamw8bit.has_kernel(CPU) else 0.51
            allowed = 1e-6 * model.terms + steps * spacing(model.parameter, dtype) + 2e-7 * model.parameter.abs()
            assert bool(((seen.double() - model.parameter).abs() <= allowed).all())
            assert state["step"] == update + 1
            for index, moment, scale, code in zip("12", model.moments, model.scales, model.codes, strict=True):
                kept = state[f"state{index}"].cpu().reshape(-1)
                if kept.dtype == torch.float32:
                    assert tensor.numel() < 4096
                    assert torch.allclose(kept.double(), moment, rtol=1e-6, atol=1e-30)
                else:
                    assert torch.allclose(state[f"absmax{index}"].cpu().double(), scale, rtol=1e-6, atol=0)
                    off = (kept.int() - code.int()).abs()
                    assert off.max() <= 1  # where float32 and float64 fall on two sides of a midpoint
                    assert (off != 0).sum() <= max(1, 0.001 * len(off))


def spacing(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of a dtype."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** torch.floor(torch.log2(numbers.abs().clamp(min=info.tiny)))


def test_bitsandbytes_finds_the_same_codes_from_equal_state(device: torch.device) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    ours, theirs = parameters(device), parameters(device)
    mine, other = AdamW8bit(ours, **SETTINGS), optim.AdamW8bit(theirs, **SETTINGS)
    same = total = 0
    for update in range(6):
        before = [tensor.detach().clone() for tensor in ours]
        with torch.no_grad():
            for a, b in zip(ours, theirs, strict=True):
                b.copy_(a)
        if update:
            other.load_state_dict(mine.state_dict())
        for tensors in (ours, theirs):
            give_gradients(tensors, update)
        mine.step()
        other.step()
        for a, b, old in zip(ours, theirs, before, strict=True):
            # On CUDA bitsandbytes decays what it has moved, which differs by the decay's share of the movement.
            tolerance = 1e-6 + (2 * SETTINGS["lr"] * SETTINGS["weight_decay"] + 1e-5) * (a - old).abs()
            assert bool(((a - b).abs() <= tolerance).all())
            one, two = mine.state[a], other.state[b]
            if one["state1"].dtype == torch.uint8:
                for key, absmax in (("state1", "absmax1"), ("state2", "absmax2")):
                    assert torch.allclose(one[absmax], two[absmax], rtol=1e-6)
                    same += int((one[key] == two[key]).sum())
                    total += a.numel()
    # On the CPU bitsandbytes looks codes up by a float's first 16 bits: 3 % of the second moment's are not the nearest.
    assert same >= (0.999 if device.type == "cuda" else 0.94) * total


def test_where_bitsandbytes_has_another_code_on_the_cpu_this_one_is_nearer() -> None:
    pytest.importorskip("bitsandbytes")
    for signed in (True, False):
        values, numbers = dynamic_map(signed, CPU), drawn(200, BLOCK, seed=5)
        numbers = (numbers if signed else numbers**2).reshape(-1)
        theirs, scales = torch.ops.bitsandbytes.quantize_blockwise(numbers, values, BLOCK)
        parts = numbers / scales.repeat_interleave(BLOCK)
        ours = nearest(parts, signed)
        distances = [(values[codes.long()].double() - parts.double()).abs() for codes in (ours, theirs.view(-1))]
        assert bool((distances[0] <= distances[1]).all())


def trained(optimizer_class: Any, device: torch.device, updates: int = 200, **keywords: Any) -> tuple[Tensor, float]:
    """Weights and last loss of a small network that learns a fixed function."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 4)).to(device)
    teacher = nn.Linear(16, 4).to(device)
    optimizer = optimizer_class(model.parameters(), **(SETTINGS | {"lr": 1e-3} | keywords))
    generator, loss = torch.Generator().manual_seed(1), torch.zeros(())
    for _ in range(updates):
        inputs = torch.randn(64, 16, generator=generator).to(device)
        loss = nn.functional.mse_loss(model(inputs), torch.sin(3 * teacher(inputs)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach().cpu(), loss.item()


def test_200_updates_stay_as_close_to_32_bits_as_bitsandbytes_own(device: torch.device) -> None:
    if device == CPU and adamw8bit.has_kernel(CPU):
        pytest.skip("200 updates are too slow in the interpreter, whose single steps other tests compare")
    optim = pytest.importorskip("bitsandbytes.optim")
    exact, exact_loss = trained(torch.optim.AdamW, device)
    ours, our_loss = trained(AdamW8bit, device)
    theirs, their_loss = trained(optim.AdamW8bit, device)
    assert 0 < float((ours - exact).norm()) <= 1.1 * float((theirs - exact).norm())
    assert abs(our_loss - exact_loss) <= max(1.5 * abs(their_loss - exact_loss), 0.01 * exact_loss)


def test_every_element_is_updated_whatever_the_shape(device: torch.device) -> None:
    storage = torch.zeros(20_000, device=device)
    views = [
        storage[1:4999],
        storage[5003:5003],
        storage[5003:9103].view(100, 41),
        storage[9999:15_999].view(3, 2000).t(),
    ]
    tensors = [nn.Parameter(view) for view in views]
    guard = storage.clone()
    for tensor in tensors:
        tensor.grad = torch.ones(tensor.shape, device=device).as_strided(tensor.shape, (0,) * tensor.ndim)
        with torch.no_grad():
            tensor.fill_(1.0)
    optimizer = AdamW8bit(tensors, lr=0.25, weight_decay=0.0)
    optimizer.step()
    inside = torch.zeros_like(guard, dtype=torch.bool)
    for start, end in ((1, 4999), (5003, 9103), (9999, 15_999)):
        inside[start:end] = True
    assert torch.allclose(storage[inside], torch.tensor(0.75, device=device), atol=1e-6)
    assert bool((storage[~inside] == 0).all())


def test_memory_order_of_parameter_and_gradient_may_differ(device: torch.device) -> None:
    plain, turned = (nn.Parameter(drawn(80, 96, seed=3).to(device)) for _ in range(2))
    turned.data = turned.data.t().contiguous().t()
    for update in range(2):
        give_gradients([plain, turned], 0)
        turned.grad = plain.grad
        AdamW8bit([plain], min_8bit_size=10**9, **SETTINGS).step()
        AdamW8bit([turned], min_8bit_size=10**9, **SETTINGS).step()
        assert torch.equal(plain, turned), update


def test_a_nan_in_a_gradient_is_not_hidden(device: torch.device) -> None:
    tensor = nn.Parameter(torch.ones(5000, device=device))
    optimizer = AdamW8bit([tensor])
    tensor.grad = torch.ones_like(tensor)
    tensor.grad[7] = torch.nan
    optimizer.step()
    assert tensor.isnan().nonzero().tolist() == [[7]]


def test_groups_have_their_own_numbers_and_the_schedule_is_obeyed(device: torch.device) -> None:
    first, second, third = (nn.Parameter(torch.ones(4096, device=device)) for _ in range(3))
    groups: list[dict[str, Any]] = [
        {"params": [first], "lr": 0.5},
        {"params": [second], "weight_decay": 0.5},
        {"params": [third]},
    ]
    optimizer = AdamW8bit(groups, lr=0.25, weight_decay=0.0)
    for tensor in (first, second):
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    assert first.mean().item() == pytest.approx(0.5)
    assert second.mean().item() == pytest.approx(1 - 0.25 * 0.5 - 0.25)
    assert bool((third == 1).all())
    assert third not in optimizer.state
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert first.mean().item() == pytest.approx(0.5)


def test_small_tensors_and_named_ones_keep_32_bits(device: torch.device) -> None:
    embedding, matrix, bias = (nn.Parameter(torch.ones(n, device=device)) for n in (8192, 4096, 4095))
    optimizer = AdamW8bit([embedding, matrix, bias], keep_32bit=[embedding])
    other = AdamW8bit([embedding])
    for tensor in (embedding, matrix, bias):
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    other.step()
    assert optimizer.state[embedding]["state1"].dtype == torch.float32
    assert optimizer.state[embedding]["step"] == 1
    assert optimizer.state[matrix]["state2"].dtype == torch.uint8
    assert optimizer.state[bias]["state1"].dtype == torch.float32
    assert other.state[embedding]["state1"].dtype == torch.uint8  # what one optimizer keeps, another does not inherit


# -- saved and loaded ------------------------------------------------------------------------------------------------


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_goes_on_bit_equal_after_a_load(device: torch.device, dtype: torch.dtype) -> None:
    tensors = parameters(device, dtype)
    optimizer = AdamW8bit(tensors, keep_32bit=tensors[:1], **SETTINGS)
    for update in range(3):
        give_gradients(tensors, update)
        optimizer.step()
    resumed = [nn.Parameter(tensor.detach().clone()) for tensor in tensors]
    other = AdamW8bit(resumed)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    copied_tensors, copied = copy.deepcopy((tensors, optimizer))
    for update in range(3, 6):
        for these in (tensors, resumed, copied_tensors):
            give_gradients(these, update)
        for one in (optimizer, other, copied):
            one.step()
    for tensor, again, third in zip(tensors, resumed, copied_tensors, strict=True):
        assert torch.equal(tensor, again)
        assert torch.equal(tensor, third)
        for key, value in optimizer.state[tensor].items():
            assert torch.equal(other.state[again][key], value)


def test_bitsandbytes_and_this_load_each_others_state(device: torch.device) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    tensors = parameters(device)
    theirs = optim.AdamW8bit(tensors, **SETTINGS)
    for update in range(3):
        give_gradients(tensors, update)
        theirs.step()
    ours = AdamW8bit(tensors)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert {key: ours.param_groups[0][key] for key in ("lr", "eps")} == {key: SETTINGS[key] for key in ("lr", "eps")}
    back = optim.AdamW8bit(tensors)
    back.load_state_dict(through_a_file(ours.state_dict()))
    for tensor in tensors:
        assert set(back.state[tensor]) == set(theirs.state[tensor])
        for key, value in theirs.state[tensor].items():
            for loaded in (ours.state[tensor][key], back.state[tensor][key]):
                assert loaded == value if key == "step" else torch.equal(loaded, value) and loaded.dtype == value.dtype
    plain_keys = theirs.state_dict()  # as bitsandbytes before 0.49 wrote it
    plain_keys["state"] = {k: v | v.pop(adamw8bit.WRAPPED) for k, v in plain_keys["state"].items()}
    AdamW8bit(tensors).load_state_dict(plain_keys)
    for one in (ours, back):
        give_gradients(tensors, 3)
        one.step()
        assert one.state[tensors[0]]["step"] == 4


@pytest.mark.parametrize(
    ("damage", "key"),
    [
        (lambda moments: moments.pop("state2"), "state2"),
        (lambda moments: moments.update(state1=moments["state1"][:-1]), "state1"),
        (lambda moments: moments.update(absmax1=moments["absmax1"][1:]), "absmax1"),
        (lambda moments: moments.update(state2=moments["state2"].float()), "state2"),
        (lambda moments: moments.update(qmap1=moments["qmap1"].flip(0)), "qmap1"),
    ],
    ids=["missing", "too few codes", "too few scales", "codes as floats", "another map"],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(damage: Any, key: str) -> None:
    tensors = parameters(CPU)
    optimizer = AdamW8bit(tensors, **SETTINGS)
    give_gradients(tensors, 0)
    optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    damage(saved["state"][0][adamw8bit.WRAPPED])
    kept = snapshot(optimizer.state[tensors[0]])
    with pytest.raises(ValueError, match=f"saved state of parameter 0 .*{key}"):
        optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[tensors[0]]["state1"], kept["state1"])
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(AdamW8bit(tensors[:2]).state_dict())


# -- guarded ---------------------------------------------------------------------------------------------------------


def test_found_inf_leaves_everything_untouched(device: torch.device) -> None:
    guarded, plain = parameters(device), parameters(device)
    one, other = AdamW8bit(guarded, **SETTINGS), AdamW8bit(plain, **SETTINGS)
    for update in range(5):
        bad = update in (0, 3)
        give_gradients(guarded, update)
        if bad:
            guarded[0].grad[0, 0] = torch.inf  # type: ignore[index] # it has one
        one.found_inf = torch.tensor(float(bad), device=device)  # type: ignore[attr-defined] # torch's own
        before = [tensor.detach().clone() for tensor in guarded]
        states = [snapshot(one.state[tensor]) for tensor in guarded]
        one.step()
        if bad:
            for tensor, old, state in zip(guarded, before, states, strict=True):
                assert torch.equal(tensor, old)
                now = one.state[tensor]
                assert all(torch.equal(now[key], value) for key, value in state.items() if isinstance(value, Tensor))
            continue
        give_gradients(plain, update)
        other.step()
    # A skipped step does not count: the bias corrections are those of a run that never had it.
    assert [entry["step"] for entry in one.state_dict()["state"].values()] == [3] * len(guarded)
    for a, b in zip(guarded, plain, strict=True):
        assert torch.equal(a, b)


def test_torchs_scaler_is_honoured(device: torch.device) -> None:
    scaled, plain = parameters(device), parameters(device)
    one, other = AdamW8bit(scaled, **SETTINGS), AdamW8bit(plain, **SETTINGS)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=100)  # type: ignore[attr-defined] # torch's own
    for update in range(4):
        give_gradients(scaled, update)
        scaler.scale(torch.zeros((), device=device))  # creates the scale
        for tensor in scaled:
            tensor.grad.mul_(scaler.get_scale())  # type: ignore[union-attr] # it has one
        if update == 1:
            scaled[1].grad[3] = torch.nan  # type: ignore[index] # it has one
        scaler.step(one)
        scaler.update()
        if update != 1:
            give_gradients(plain, update)
            other.step()
    assert scaler.get_scale() == 2.0**9
    for a, b in zip(scaled, plain, strict=True):
        assert torch.equal(a, b)


# -- refused, sharded ------------------------------------------------------------------------------------------------


def test_what_it_cannot_update_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="plain numbers"):
        AdamW8bit([torch.ones(2)], lr=torch.tensor(0.1))  # type: ignore[arg-type] # refused
    with pytest.raises(ValueError, match="plain numbers"):
        AdamW8bit([torch.ones(2)], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="not among params"):
        AdamW8bit([torch.ones(2)], keep_32bit=[torch.ones(2)])
    for tensor in (torch.ones(8, dtype=torch.float64), torch.ones(4, 4)[:, ::2]):
        parameter = nn.Parameter(tensor)
        parameter.grad = torch.ones_like(parameter)
        with pytest.raises(ValueError, match="cannot update a parameter"):
            AdamW8bit([parameter]).step()
    table = nn.Embedding(8, 8, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        AdamW8bit(table.parameters()).step()
    moved = nn.Parameter(torch.ones(8))
    optimizer = AdamW8bit([moved], keep_32bit=[moved])
    optimizer.state[moved]["state1"] = torch.zeros(7)
    moved.grad = torch.ones(8)
    with pytest.raises(ValueError, match="another device or size"):
        optimizer.step()


def test_sharded_parameters_are_updated_where_they_are(device: torch.device, tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed import FileStore  # type: ignore[attr-defined] # its stub leaves it out
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device.type, (1,))
        plain = parameters(device)[:3]
        sharded = [nn.Parameter(distribute_tensor(tensor.detach().clone(), mesh, [Shard(0)])) for tensor in plain]
        one, other = AdamW8bit(sharded, **SETTINGS), AdamW8bit(plain, **SETTINGS)
        for update in range(2):
            give_gradients(plain, update)
            for tensor, local in zip(sharded, plain, strict=True):
                assert local.grad is not None
                tensor.grad = DTensor.from_local(local.grad.clone(), mesh, [Shard(0)])
            one.step()
            other.step()
        for tensor, local in zip(sharded, plain, strict=True):
            assert torch.equal(tensor.to_local(), local)  # type: ignore[attr-defined] # torch's own
        sharded[0].grad = DTensor.from_local(torch.ones_like(plain[0]), mesh, [Replicate()])
        with pytest.raises(ValueError, match="sharded like their parameters"):
            one.step()
    finally:
        distributed.destroy_process_group()


def test_a_closure_is_called() -> None:
    tensor = nn.Parameter(torch.ones(8))

    def closure() -> float:
        tensor.grad = None
        loss = (tensor**2).sum()
        loss.backward()
        return loss.item()

    assert AdamW8bit([tensor], lr=0.1, weight_decay=0.0).step(closure) == 8.0
    assert math.isclose(tensor[0].item(), 0.9, rel_tol=1e-5)


# -- what only a GPU can show ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Synchronization debug mode", "ignore:The CUDA Graph is empty")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_never_waits_and_lays_addresses_out_only_when_one_has_changed() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    tensors = parameters(device)
    optimizer = AdamW8bit(tensors, **SETTINGS)
    give_gradients(tensors, 0)
    optimizer.step()
    known = optimizer.launches[device][1]
    assert 1 <= len(known) <= 2  # regular ones and odd ones
    held = [tensor.grad for tensor in tensors]
    give_gradients(tensors, 1)  # at other addresses
    optimizer.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined] # torch's own
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.launches[device][1] is known
    del held
    optimizer.state[tensors[0]]["state1"] = optimizer.state[tensors[0]]["state1"].clone()
    optimizer.step()
    assert optimizer.launches[device][1] is not known
    with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
