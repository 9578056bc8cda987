"""The models and data of all rows. The bench takes the reference from here and from its public names, nowhere else."""

import functools
import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conformance.bench.case import Facts
from conformance.bench.optimizer_state import clear_state, state_bytes_per_parameter
from reference import GPT, GPTConfig
from reference.training.throughput import dense_peak as dense_peak  # for conformance.bench.card
from reference.training.throughput import flops_per_token

if TYPE_CHECKING:
    from reference.training.run import Run

FORMULA = (
    "6 N + 12 L d T FLOPs per token, as PaLM counts (arXiv:2204.02311, appendix B); causal: 6 N + 6 L d T. "
    "N weights of linear layers and head, L layers, d width, T tokens per sequence"
)


def shape(size: str) -> GPTConfig:
    """Return the model of a size: GPT-2 or Llama over 1024 tokens, or either of them tiny."""
    tiny = {"vocab_size": 256, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
    make = GPTConfig.llama if size.startswith("llama") else GPTConfig.gpt2
    return make(**(tiny if size.endswith("tiny") else {"block_size": 1024}))


@functools.cache
def tensor_shapes(size: str) -> tuple[torch.Size, ...]:
    """Return the shapes of all parameters of a model, each tied one once; built without memory."""
    with torch.device("meta"):
        model = GPT(shape(size))
    return tuple(parameter.shape for parameter in model.parameters())


def draw(config: GPTConfig, device: torch.device) -> nn.Module:
    """Return a GPT whose weights are drawn on the device, in the default dtype.

    The reference draws on the CPU, so that a run starts the same everywhere, which takes seconds for 1.3 billion
    weights. Speed does not depend on it.
    """
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight  # to_empty() gives every name memory of its own
    fill(model, config.init_std)
    if model.rotary is not None:
        model.rotary.reset_parameters()
    return model


@torch.no_grad()
def fill(model: nn.Module, init_std: float) -> None:
    """Fill matrices from normal(0, init_std), norms with 1, biases with 0; with the same numbers at each call."""
    generator = None
    for name, parameter in model.named_parameters():
        if generator is None:
            generator = torch.Generator(parameter.device).manual_seed(0)
        if parameter.ndim > 1:
            parameter.normal_(0.0, init_std, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def random_batches(config: GPTConfig, microbatch: int, device: torch.device, count: int = 8) -> list[Tensor]:
    """Return different batches of random token ids, (microbatch, T + 1) int64, on the CPU; pinned for a GPU."""
    generator = torch.Generator().manual_seed(0)
    size = (microbatch, config.block_size + 1)
    batches = [torch.randint(config.vocab_size, size, generator=generator) for _ in range(count)]
    return [batch.pin_memory() for batch in batches] if device.type == "cuda" else batches


class Updates:
    """Update after update of a run, as ``Trainer.fit`` does them."""

    def __init__(self, run: "Run", batches: list[Tensor], init_std: float) -> None:
        """Begin with the first batch.

        Args:
            run: fresh from ``Trainer.setup``, its model from :func:`draw`.
            batches: token ids (B, T + 1) each, taken in turn.
            init_std: the standard deviation that the weights were drawn with.
        """
        self.run, self.batches, self.init_std = run, batches, init_std
        self.begin()

    def begin(self) -> None:
        """Begin with the first batch again."""
        self.update, self.loss = 0, float("nan")
        self.source = itertools.cycle(self.batches)
        self.upcoming = self.run.fetch(self.source)

    def step(self) -> None:
        """Do one update, and fetch the next batch meanwhile."""
        done = self.run.update_once(self.update, self.upcoming, self.source)
        self.update, self.loss, self.upcoming = self.update + 1, done.loss, done.following

    def reset(self) -> None:
        """Go back to the start, in place: compiled code knows the tensors by address."""
        fill(self.run.module, self.init_std)
        self.run.bare.zero_grad()
        clear_state(self.run.bare)
        self.begin()


def compiles(device: torch.device) -> bool:
    """Return whether rows that are to be compiled are: inductor takes minutes on a CPU, where no figure counts."""
    return device.type == "cuda"


def compilation(wanted: bool, device: torch.device) -> str:
    """Return the end of a row's name, which says what is done about compilation."""
    if not wanted:
        return "eager"
    return "compiled" if compiles(device) else f"compilation off on the {device.type.upper()}"


def common_facts(config: GPTConfig, microbatch: int, device: torch.device, module: nn.Module) -> Facts:
    """Return what is known of any row of training beforehand; FLOPs are those of the reference's shape."""
    return {
        "tokens": microbatch * config.block_size,
        "microbatch": microbatch,
        "length": config.block_size,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "flops_per_token": flops_per_token(config, config.block_size),
        "flops_per_token_causal": flops_per_token(config, config.block_size, causal=True),
        "formula": FORMULA,
        "batches": "random tokens, from pinned memory" if device.type == "cuda" else "random tokens",
        "clip": 1.0,
    }


def later_facts(loss: float | Tensor, optimizer: Optimizer) -> Facts:
    """Return what is known of any row of training after its steps."""
    return {"last loss": float(loss), "state bytes per parameter": state_bytes_per_parameter(optimizer)}
