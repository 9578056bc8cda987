"""From a class path to an optimizer: keywords, decay groups, 8-bit overrides."""

import copy
import importlib
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from reference.config import TrainConfig
from reference.errors import ConfigurationError
from reference.model.embedding import swap_embeddings
from reference.model.gpt import GPT
from reference.optimizers import build_optimizer, decay_groups, find_class
from reference.optimizers.build import added_keywords, check_keywords
from tests.reference.optimizers import CPU, OF_TORCH, gpt, take_steps

RMSNormOfALibrary = type("RMSNormOfALibrary", (nn.ParameterDict,), {})
pytestmark = pytest.mark.filterwarnings(
    # grokadamw 0.1.2 opens torch.cuda.amp.autocast at every step: deprecated, and off without a GPU.
    "ignore:.*torch.cuda.amp.autocast:FutureWarning",
    "ignore:CUDA is not available:UserWarning",
)


class NeedsMomentum(SGD):
    def __init__(self, params: Any, momentum: float, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr, momentum=momentum)


class TakesAnything(SGD):
    def __init__(self, params: Any, **keywords: Any) -> None:
        super().__init__(params, **keywords)


class Mixture(nn.Module):  # tensors of every role, in modules that reference knows and modules that it does not
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(6, 4)
        self.norm_in = nn.Linear(4, 4)  # a name alone makes no norm
        self.conv = nn.Conv1d(4, 4, 3)
        self.ln = nn.LayerNorm(4)
        self.rms = RMSNormOfALibrary({"gamma": torch.ones(2, 4)})
        self.memory_tokens = nn.Parameter(torch.ones(2, 4))
        self.pos_emb = nn.Parameter(torch.ones(3, 4))
        self.expert = nn.Parameter(torch.ones(2, 4, 4))
        self.expert_bias = nn.Parameter(torch.ones(2, 4))
        self.gate = nn.Parameter(torch.ones(4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.wte.weight


def decayed_names(model: nn.Module, decay: str) -> set[str]:
    """The names that decay; fails unless every trainable tensor is in exactly one group, and no group is empty."""
    groups = decay_groups(model, decay)
    assert all(group["params"] for group in groups)
    grouped = [id(tensor) for group in groups for tensor in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    chosen = {id(tensor) for group in groups if "weight_decay" not in group for tensor in group["params"]}
    assert all(group.get("weight_decay", 0.0) == 0.0 for group in groups)
    return {name for name, p in model.named_parameters() if id(p) in chosen}


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("AdamW", "'AdamW' is not a class path: give module and class, for example 'torch.optim.AdamW'."),
        ("torch.optim.AdmW", "torch.optim has no 'AdmW'; did you mean torch.optim.AdamW?"),
        ("torch.optim.Quokka", "torch.optim has no 'Quokka'."),
        ("no_such_package.Adam", "the optimizer 'no_such_package.Adam' cannot be imported (No module named"),
        ("torch.nn.Linear", "torch.nn.Linear is not a torch.optim.Optimizer, but another class."),
    ],
)
def test_a_path_without_optimizer_is_refused(path: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        find_class(path)


@pytest.mark.parametrize(
    ("path", "arguments", "sentence"),
    [
        (
            "torch.optim.AdamW",
            {"weigth_decay": 0.1},
            "AdamW does not accept 'weigth_decay': did you mean 'weight_decay'?",
        ),
        ("torch.optim.AdamW", {"params": []}, "AdamW does not accept 'params'"),
        ("grokadamw.GrokAdamW", {"fused": True}, "GrokAdamW does not accept 'fused'"),
        (f"{__name__}.NeedsMomentum", {"lr": 1.0}, "NeedsMomentum needs 'momentum': add it to optimizer_args."),
        ("torch.optim.LBFGS", {}, "torch.optim.LBFGS computes the loss several times per step, through a closure"),
        ("torch.optim.AdamW", {"lr": -1.0}, "torch.optim.AdamW refused its arguments {'fused': True, 'lr': -1.0}: Inv"),
        (f"{__name__}.TakesAnything", {"speed": 1}, "TakesAnything refused its arguments {'speed': 1}"),
    ],
)
def test_keywords_that_cannot_work_are_refused(path: str, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        build_optimizer(path, arguments, gpt(), CPU)


def test_keywords_that_may_work_are_accepted() -> None:
    check_keywords(TakesAnything, {"anything": 1})
    assert build_optimizer(f"{__name__}.NeedsMomentum", {"momentum": 0.75}, gpt(), CPU).defaults["momentum"] == 0.75


def test_arguments_reach_the_optimizer_and_are_not_changed() -> None:
    arguments: dict[str, Any] = {"lr": 0.25, "betas": (0.8, 0.9), "weight_decay": 0.5}
    before = copy.deepcopy(arguments)
    optimizer = build_optimizer("torch.optim.AdamW", arguments, gpt(), CPU)
    assert arguments == before
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.9), (0.8, 0.9)]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert optimizer.defaults["fused"] is True
    assert not hasattr(optimizer, "mng")  # bitsandbytes' own affair


def test_an_optimizer_without_weight_decay_gets_every_tensor() -> None:
    model = gpt()
    model.norm.requires_grad_(False)
    optimizer = build_optimizer("torch.optim.Rprop", {}, model, CPU)
    assert len(optimizer.param_groups) == 1
    assert list(map(id, optimizer.param_groups[0]["params"])) == [id(p) for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("path", "arguments", "device", "added"),
    [
        ("torch.optim.AdamW", {}, "cpu", {"fused": True}),
        ("torch.optim.AdamW", {}, "cuda", {"fused": True}),
        ("torch.optim.AdamW", {}, "meta", {}),
        ("torch.optim.AdamW", {"fused": False}, "cpu", {}),
        ("torch.optim.AdamW", {"foreach": True}, "cpu", {}),
        ("torch.optim.AdamW", {"foreach": False}, "cpu", {"fused": True}),
        ("torch.optim.AdamW", {"differentiable": True}, "cpu", {}),
        ("torch.optim.RMSprop", {}, "cpu", {}),
        ("grokadamw.GrokAdamW", {}, "cuda", {}),
        ("bitsandbytes.optim.AdamW8bit", {}, "cuda", {}),
        (f"{__name__}.TakesAnything", {}, "cpu", {}),
    ],
)
def test_fused_is_added_where_it_works(
    path: str, arguments: dict[str, Any], device: str, added: dict[str, Any]
) -> None:
    config = TrainConfig(optimizer=path, optimizer_args=arguments)
    assert added_keywords(find_class(path), config, torch.device(device)) == added
    assert added_keywords(find_class(path), replace(config, precision="16-mixed"), torch.device(device)) == {}
    used = build_optimizer(path, arguments, gpt(), torch.device(device)).defaults.get("fused")
    assert used == (arguments | added).get("fused")


@pytest.mark.parametrize("name", OF_TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tensor_is_moved(name: str, dtype: torch.dtype) -> None:
    """By most of its elements: torch 2.12 and 2.13 leave nearly all of them with fused SGD (pytorch#191763)."""
    model = gpt(n_embd=32).to(dtype)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    path = f"torch.optim.{name.partition(',')[0]}"
    optimizer = build_optimizer(path, {"lr": 0.5, **OF_TORCH[name]}, model, CPU)
    take_steps(model, optimizer, 2)
    for (label, parameter), start in zip(model.named_parameters(), before, strict=True):
        assert (parameter != start).float().mean() > 0.9, label


def test_fused_sgd_on_16_bit_weights_is_refused_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = gpt().bfloat16()
    assert not build_optimizer("torch.optim.SGD", {}, model, CPU).defaults["fused"]
    assert "optimizer: SGD without fused, which skips 16-bit weights on the CPU (pytorch#191763)" in caplog.messages
    sentence = "SGD with fused=True does not train 16-bit weights on the CPU (pytorch#191763): leave fused out."
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        build_optimizer("torch.optim.SGD", {"fused": True}, model, CPU)
    assert build_optimizer("torch.optim.SGD", {"fused": True}, gpt(), CPU).defaults["fused"]


ROLE = {"norm_in.weight", "conv.weight", "expert"}
MATRICES = ROLE | {"wte.weight", "rms.gamma", "memory_tokens", "pos_emb", "expert_bias"}
ALL = MATRICES | {"norm_in.bias", "conv.bias", "ln.weight", "ln.bias", "gate"}


@pytest.mark.parametrize(("decay", "expected"), [("role", ROLE), ("ndim", MATRICES), ("all", ALL)])
def test_decay_groups(decay: str, expected: set[str]) -> None:
    assert decayed_names(Mixture(), decay) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_decay_of_a_gpt(tied: bool) -> None:
    blocks = {f"blocks.0.{kind}.weight" for kind in ("attention.qkv", "attention.proj", "mlp.fc", "mlp.proj")}
    assert decayed_names(gpt(tie_embeddings=tied), "role") == blocks | (set() if tied else {"head.weight"})


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="GPT has no trainable parameter"):
        build_optimizer("torch.optim.AdamW", {}, gpt().requires_grad_(False), CPU)


def embedding_state_dtype(model: GPT) -> torch.dtype:
    optimizer = build_optimizer("bitsandbytes.optim.AdamW8bit", {}, model, CPU)
    take_steps(model, optimizer, 1)
    assert optimizer.state[model.get_parameter("blocks.0.mlp.fc.weight")]["state1"].dtype == torch.uint8
    return optimizer.state[model.embedding.weight]["state1"].dtype


def test_the_override_of_a_stable_embedding_stays_with_its_model() -> None:
    models = [gpt(vocab_size=128, n_embd=64) for _ in range(3)]  # 4,096 elements and more: 8-bit state
    swap_embeddings(models[0])
    swap_embeddings(models[2])
    assert [embedding_state_dtype(model) for model in models] == [torch.float32, torch.uint8, torch.float32]
    assert embedding_state_dtype(models[0]) == torch.float32, "the second optimizer of a model lost the override"


def test_an_override_of_the_users_is_kept() -> None:
    model = gpt(vocab_size=128, n_embd=64)
    manager = importlib.import_module("bitsandbytes.optim").GlobalOptimManager.get_instance()
    manager.register_module_override(model.embedding, "weight", {"optim_bits": 32})
    assert embedding_state_dtype(model) == torch.float32


class WithoutRate(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


def test_a_class_without_a_learning_rate_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="WithoutRate keeps no lr in its parameter groups"):
        build_optimizer("tests.reference.test_optimizer.WithoutRate", {}, gpt(), CPU)
