"""The same training step by other libraries: GPT-2's shape, bf16 autocast, fused AdamW, clipped at 1, compiled.

Each is written as one of its own users would who wants it to be fast. Where that is not what its tutorial shows, the
comment says why, and so does the row. None of them reads anything back from the GPU during a step.
"""

import importlib.metadata
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from conformance.bench.case import Case, Prepared, Setting, Unavailable
from conformance.bench.optimizer_step import clear_state
from conformance.bench.training import (
    ADAMW,
    GROUP,
    common_facts,
    compilation,
    compiles,
    describe_groups,
    later_facts,
    optimizer_name,
    random_batches,
    shape,
)
from reference.config import GPTConfig

MICROBATCH = 32

Logits = Callable[[Tensor], Any]  # token ids (B, T) to what the library's model gives
Loss = Callable[[Logits, Tensor, Tensor], Tensor]  # of a forward, token ids and targets (B, T)


@dataclass(frozen=True)
class Peer:
    """A library's GPT-2."""

    name: str
    """The row's name."""
    package: str
    """On PyPI."""
    build: Callable[[GPTConfig], nn.Module]
    """Its model of that shape, on the default device."""
    loss: Loss
    """Mean cross entropy in nats per token."""
    about: str
    """How its model, or the way it is run, differs from GPT-2's and from the reference's."""
    compiles_loss: bool = True
    """Whether the loss is compiled together with the model, or stays eager."""
    priority: int = 2
    """As :attr:`Case.priority`."""


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The peers' rows; none in a quick run. On the CPU with tiny shapes, and eager."""
    size = "gpt2-tiny" if Setting(device, quick).small else "gpt2-124m"
    return [
        Case(
            GROUP,
            size,
            f"{peer.name}, {compilation(True, device)}",
            partial(prepare, peer, shape(size)),
            budget=1.5,
            seconds=23.0,
            graph=peer.name if compiles(device) else "",
            compiling=15.0,
            priority=peer.priority,
        )
        for peer in PEERS
        if not quick
    ]


def reference_model(config: GPTConfig) -> nn.Module:
    """The reference's GPT, to be run by the loop of the others: what its own loop costs is the difference."""
    from reference.model.gpt import GPT

    return GPT(config)


def litgpt_model(config: GPTConfig) -> nn.Module:
    """LitGPT's GPT, tied as by ``tie_embeddings`` of its pretraining. It has no learned positions: rotary ones."""
    from litgpt.config import Config
    from litgpt.model import GPT

    model = GPT(
        Config(
            block_size=config.block_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            vocab_size=config.vocab_size,
            padded_vocab_size=config.vocab_size,
            intermediate_size=config.hidden_size,
            parallel_residual=False,
            gelu_approximate="tanh",
        )
    )
    model.apply(model._init_weights)
    model.lm_head.weight = model.transformer.wte.weight
    return model  # type: ignore[no-any-return] # the package has no types


def litgpt_loss(chunk_size: int, logits: Logits, ids: Tensor, targets: Tensor) -> Tensor:
    """LitGPT's own loss: in chunks of so many tokens, or with 0 in one piece."""
    from litgpt.utils import chunked_cross_entropy

    loss: Tensor = chunked_cross_entropy(logits(ids), targets, chunk_size=chunk_size)
    return loss


def transformers_model(config: GPTConfig) -> nn.Module:
    """transformers' GPT2LMHeadModel, without dropout, with an attention that takes no mask."""
    from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # Under torch.compile "sdpa" builds a causal mask and hands it over (torch before 2.14, says transformers'
    # masking_utils), and SDPA with a mask cannot take the flash kernel. For an attention registered under another
    # name it builds none, and the same function falls back on is_causal.
    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    return GPT2LMHeadModel(  # type: ignore[no-any-return] # the package's types are not followed
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_inner=config.hidden_size,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
            attn_implementation="sdpa_without_mask",
        )
    )


def transformers_loss(model: Logits, ids: Tensor, targets: Tensor) -> Tensor:
    """Of its logits. Its own, by ``labels``, breaks the compiled graph with a warning; it computes the same."""
    return F.cross_entropy(model(ids).logits.flatten(0, 1).float(), targets.flatten())


def x_transformers_model(config: GPTConfig) -> nn.Module:
    """x-transformers' TransformerWrapper around a Decoder, with flash attention and tied embedding."""
    from x_transformers import Decoder, TransformerWrapper

    decoder = Decoder(
        dim=config.n_embd,
        depth=config.n_layer,
        heads=config.n_head,
        attn_dim_head=config.head_size,
        attn_flash=True,
        ff_mult=config.hidden_size / config.n_embd,
    )
    return TransformerWrapper(  # type: ignore[no-any-return] # the package has no types
        num_tokens=config.vocab_size, max_seq_len=config.block_size, tie_embedding=True, attn_layers=decoder
    )


def plain_loss(logits: Logits, ids: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of all targets, in float32; x-transformers' AutoregressiveWrapper computes the same."""
    return F.cross_entropy(logits(ids).flatten(0, 1).float(), targets.flatten())


LITGPT = "rotary positions instead of learned ones, on a quarter of each head, its default"
PEERS = (
    Peer(
        "LitGPT, loss in chunks of 128",
        "litgpt",
        litgpt_model,
        partial(litgpt_loss, 128),
        f"{LITGPT}; the model is compiled and the loss eager, as in litgpt.pretrain",
        compiles_loss=False,
        priority=6,
    ),
    Peer(
        "LitGPT, loss in one piece",
        "litgpt",
        litgpt_model,
        partial(litgpt_loss, 0),
        f"{LITGPT}; model and loss are compiled together, which its pretrain does not do",
    ),
    Peer(
        "transformers GPT2LMHeadModel",
        "transformers",
        transformers_model,
        transformers_loss,
        "sdpa under another name, so that no mask is built; loss of its logits, compiled together",
    ),
    Peer(
        "reference's GPT in the loop of these",
        "gpt-conformance",
        reference_model,
        plain_loss,
        "in the loop of the other libraries: one parameter group, and nothing is read back",
    ),
    Peer(
        "x-transformers TransformerWrapper",
        "x-transformers",
        x_transformers_model,
        plain_loss,
        "no biases in attention and norms; three projections for q, k, v; compiled together with the loss",
    ),
)


def prepare(peer: Peer, config: GPTConfig, setting: Setting) -> Prepared:
    """A peer's row, ready to step.

    Raises:
        Unavailable: if the library cannot be imported.
    """
    device = setting.device
    try:
        with torch.device(device):
            model = peer.build(config).to(device).train()
    except ImportError as error:
        raise Unavailable(
            f"{peer.package} cannot be imported ({error}): pip install gpt-conformance[peers]."
        ) from error
    microbatch = 2 if setting.small else MICROBATCH
    batches = random_batches(config, microbatch, device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, **ADAMW, fused=True)
    compute = compiled(peer, model) if compiles(device) else partial(peer.loss, model)
    source = itertools.cycle(batches)
    value = torch.tensor(float("nan"))

    def step() -> None:
        nonlocal value
        batch = next(source).to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = compute(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.detach()

    back = rewind(model, optimizer)

    def reset() -> None:
        nonlocal source
        back()
        source = itertools.cycle(batches)

    facts = common_facts(config, microbatch, device, model) | {
        "precision": "bf16-mixed",
        "optimizer": optimizer_name(optimizer),
        "decays": describe_groups(optimizer),
        "compiled": compilation(True, device),
        "library": release(peer.package),
        "note": peer.about,
        "host": "reads nothing",
    }
    return Prepared(step, facts, reset, None, batches, lambda: later_facts(value, optimizer))


def rewind(module: nn.Module, optimizer: Optimizer) -> Callable[[], None]:
    """A function that brings parameters and optimizer back to where they are now, in place.

    In place, because compiled code and captured graphs know the tensors by address. The optimizer must be new. The
    copy is on the CPU, so that it does not show in the GPU's memory.
    """
    start = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in module.parameters()]

    @torch.no_grad()
    def back() -> None:
        for parameter, value in start:
            parameter.copy_(value)
        optimizer.zero_grad()
        clear_state(optimizer)

    return back


def release(package: str) -> str:
    """Name and version of a package. Our own may run from a checkout that is not installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def compiled(peer: Peer, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Ids and targets to the loss, compiled as far as the peer has it."""
    if not peer.compiles_loss:
        return partial(peer.loss, torch.compile(model))
    return torch.compile(lambda ids, targets: peer.loss(model, ids, targets))
