"""Weights from a normal distribution cut at three standard deviations."""

from torch import nn

from conformance import Recipe, TensorInfo, TruncatedNormal, everything_but
from conformance.subject import Distribution
from tests.stacks import gpt, loop
from tests.stacks.gpt import STD, Config


class Truncated(gpt.GPT):
    limits: tuple[float, float] = (-3 * STD, 3 * STD)

    def initialise(self, module: nn.Module) -> None:
        super().initialise(module)
        if isinstance(module, nn.Linear | nn.Embedding):
            low, high = self.limits
            nn.init.trunc_normal_(module.weight, 0.0, STD, low, high)


class NotCut(Truncated):
    limits = (-2.0, 2.0)  # PyTorch's defaults: they are values, although they look like standard deviations


class CutAtTwo(Truncated):
    limits = (-2 * STD, 2 * STD)


class Policy(gpt.Policy):
    def initial(self, recipe: Recipe, tensor: TensorInfo) -> Distribution:
        if len(tensor.shape) < 2:
            return super().initial(recipe, tensor)
        return TruncatedNormal(0.0, STD, -3 * STD, 3 * STD)


class TruncatedInit:
    name, version, policy = "truncated normal", "1", Policy()
    claimed = ("gpt-shape", "tied", "microbatches", "dropout", "evaluate", "evaluate-every")
    lacks = everything_but(*claimed, reason="not in loop.train()")

    def __init__(self, fault: str = "") -> None:
        self.model = {"": Truncated, "not cut at all": NotCut, "cut at two": CutAtTwo}[fault]

    def train(self, recipe: Recipe) -> None:
        config = Config.of(recipe)
        loop.train(loop.build(self.model, config), config)
