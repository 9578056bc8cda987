"""The same training step by other libraries: GPT-2's shape, bf16 autocast, fused AdamW, clipped at 1, compiled.

Each is written as a user of it would write it to be fast. Where that is not what its tutorial shows, the comment says
why, and so does the row. None of them reads anything back from the GPU during a step.

To add a row, add a line to PEERS.
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

from conformance.bench.case import TRAINING_STEP, Case, Prepared, Setting
from conformance.bench.models import common_facts, compilation, compiles, later_facts, random_batches, shape
from conformance.bench.optimizer_state import describe_groups, optimizer_name, rewind
from conformance.bench.training import ADAMW
from conformance.errors import Unavailable
from reference import GPT, GPTConfig

Logits = Callable[[Tensor], Any]  # token ids (B, T) to what the library's model gives
Loss = Callable[[Logits, Tensor, Tensor], Tensor]  # of a forward, token ids and targets (B, T)


@dataclass(frozen=True)
class Peer:
    """A library's GPT-2."""

    name: str  # the row's name
    package: str  # on PyPI
    build: Callable[[GPTConfig], nn.Module]  # its model of that shape, on the default device
    loss: Loss  # mean cross entropy in nats per token
    about: str  # how its model, or the way it is run, differs from GPT-2's and from the reference's
    compiles_loss: bool = True  # whether the loss is compiled together with the model, or stays eager
    priority: int = 2  # as :attr:`Case.priority`
    microbatch: int = 32  # sequences per step


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Return the peers' rows; none in a quick run. On the CPU they are tiny, and eager."""
    size = "gpt2-tiny" if Setting(device, quick).small else "gpt2-124m"
    suffix = compilation(True, device)
    return [
        Case(
            TRAINING_STEP,
            size,
            f"{peer.name}, {suffix}",
            partial(prepare, peer, shape(size)),
            seconds=23.0,
            graph=peer.name if compiles(device) else "",
            compiling=15.0,
            priority=peer.priority,
        )
        for peer in PEERS
        if not quick
    ]


def litgpt_model(config: GPTConfig) -> nn.Module:
    """Return LitGPT's GPT, tied as by ``tie_embeddings`` of its pretraining. Its positions are rotary, not learned."""
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
    """Return LitGPT's own loss: in chunks of so many tokens, or with 0 in one piece."""
    from litgpt.utils import chunked_cross_entropy

    loss: Tensor = chunked_cross_entropy(logits(ids), targets, chunk_size=chunk_size)
    return loss


def transformers_model(config: GPTConfig) -> nn.Module:
    """Return transformers' GPT2LMHeadModel, without dropout, with an attention that takes no mask."""
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
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            **dict.fromkeys(("bos_token_id", "eos_token_id")),
            use_cache=False,
            attn_implementation="sdpa_without_mask",
        )
    )


def transformers_loss(model: Logits, ids: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of its logits. Its own, by ``labels``, computes the same, but breaks the compiled graph."""
    return F.cross_entropy(model(ids).logits.flatten(0, 1).float(), targets.flatten())


def x_transformers_model(config: GPTConfig) -> nn.Module:
    """Return x-transformers' TransformerWrapper around a Decoder, with flash attention and tied embedding."""
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
    """Return the cross entropy of all targets, in float32, as x-transformers' AutoregressiveWrapper does."""
    return F.cross_entropy(logits(ids).flatten(0, 1).float(), targets.flatten())


LITGPT = "rotary positions instead of learned ones, on a quarter of each head, its default"
EAGER_LOSS = f"{LITGPT}; the model is compiled and the loss eager, as in litgpt.pretrain"
ONE_PIECE = f"{LITGPT}; model and loss are compiled together, which its pretrain does not do"
MASK = "sdpa under another name, so that no mask is built; loss of its logits, compiled together"
LOOP = "in the loop of the other libraries: one parameter group, and nothing is read back"
LARGE = "microbatch 64, as the preset gpt2-124m of the reference has it"
THREE = "no biases in attention and norms; three projections for q, k, v; compiled together with the loss"
PEERS = (
    Peer("LitGPT, loss in chunks of 128", "litgpt", litgpt_model, partial(litgpt_loss, 128), EAGER_LOSS, False, 6),
    Peer("LitGPT, loss in one piece", "litgpt", litgpt_model, partial(litgpt_loss, 0), ONE_PIECE),
    Peer("transformers GPT2LMHeadModel", "transformers", transformers_model, transformers_loss, MASK),
    Peer("reference's GPT in the loop of these", "gpt-conformance", GPT, plain_loss, LOOP),
    Peer("x-transformers TransformerWrapper", "x-transformers", x_transformers_model, plain_loss, THREE),
    Peer(
        "transformers GPT2LMHeadModel, microbatch 64",
        "transformers",
        transformers_model,
        transformers_loss,
        f"{MASK}; {LARGE}",
        priority=4,
        microbatch=64,
    ),
)


def prepare(peer: Peer, config: GPTConfig, setting: Setting) -> Prepared:
    """Build a peer's row, ready to step.

    Raises:
        Unavailable: if the library cannot be imported.
    """
    device = setting.device
    try:
        with torch.device(device):
            model = peer.build(config).to(device).train()
    except ImportError as error:
        raise Unavailable(
            f"{peer.package} cannot be imported ({error}): pip install 'gpt-conformance[peers]'."
        ) from error
    microbatch = 2 if setting.small else peer.microbatch
    batches = random_batches(config, microbatch, device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, **ADAMW, fused=True)
    compute: Callable[[Tensor, Tensor], Tensor] = partial(peer.loss, model)
    if compiles(device):
        whole = torch.compile(lambda ids, targets: peer.loss(model, ids, targets))
        compute = whole if peer.compiles_loss else partial(peer.loss, torch.compile(model))
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
    return Prepared(step, facts, reset, inputs=batches, later_facts=lambda: later_facts(value, optimizer))


def release(package: str) -> str:
    """Return name and version of a package. Our own may run from a checkout that is not installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package
