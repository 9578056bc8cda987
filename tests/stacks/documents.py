"""Documents packed into sequences: a token sees no document but its own, which an end id closes."""

from torch import Tensor

from conformance import Recipe, everything_but
from tests.stacks import gpt, loop
from tests.stacks.gpt import Config


class Isolated(gpt.GPT):
    end, fault = 0, ""

    def mask(self, ids: Tensor) -> Tensor:
        ends = (ids == self.end).long()
        document = ends.cumsum(1)  # (B, T): how many ended up to here, and before, so that an end is of what it ends
        if self.fault != "an end opens the next document":
            document = document - ends
        same = document.unsqueeze(2) == document.unsqueeze(1)
        if self.fault == "documents see each other":
            return super().mask(ids)
        return (same & super().mask(ids)).unsqueeze(1)


class Policy(gpt.Policy):
    def __init__(self, end: int) -> None:
        self.end = end

    def document_end(self, recipe: Recipe) -> int:
        return self.end


class Documents:
    name, version = "isolated documents", "1"
    claimed = ("gpt-shape", "tied", "microbatches", "dropout", "evaluate", "evaluate-every")
    lacks = everything_but(*claimed, reason="not in loop.train()")

    def __init__(self, fault: str = "", end: int = 0) -> None:
        self.fault, self.end, self.policy = fault, end, Policy(end)

    def train(self, recipe: Recipe) -> None:
        config = Config.of(recipe)
        model = loop.build(Isolated, config)
        model.end, model.fault = self.end, self.fault
        loop.train(model, config)
