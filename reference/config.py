"""What to build, on what and how to train it: frozen dataclasses, a docstring under each field."""

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from reference.errors import ConfigurationError

__all__ = ["IGNORE", "ConfigurationError", "DataConfig", "GPTConfig", "TrainConfig", "as_plain"]

DEEPEST = 10_000  # blocks; a model is built block by block, and no deeper one was ever trained
IGNORE = -100  # a target with this value counts neither in the loss nor in its mean


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a decoder-only transformer.

    The defaults are GPT-2 124M (Radford et al. 2019); :meth:`llama` turns the same model into the
    shape of Touvron et al. 2023 (https://arxiv.org/abs/2302.13971).

    Raises:
        ConfigurationError: if the numbers do not fit each other.
    """

    vocab_size: int = 50304
    """Rows of the embedding and columns of the logits. 50304 is GPT-2's 50257, padded to a multiple of 64."""
    block_size: int = 1024
    """Longest sequence, in tokens, that the model can see."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Number of query heads."""
    n_kv_head: int | None = None
    """Key/value heads (grouped-query attention, https://arxiv.org/abs/2305.13245). None: as many as n_head."""
    n_embd: int = 768
    """Width of the residual stream."""
    intermediate_size: int | None = None
    """Hidden width of the MLP. None: 4 n_embd for GELU, 8/3 n_embd rounded up to a multiple of 32 for SwiGLU."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of normalisation, before each sublayer and before the head."""
    norm_eps: float = 1e-5
    """Added to the variance (or mean square) inside the norms."""
    position: Literal["learned", "rotary"] = "learned"
    """Learned absolute positions, or rotary ones (https://arxiv.org/abs/2104.09864)."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """GELU (tanh form, as in GPT-2) or SwiGLU (https://arxiv.org/abs/2002.05202)."""
    bias: bool = True
    """Biases in the linear layers and LayerNorms. The head never has one."""
    tie_embeddings: bool = True
    """The head shares the embedding's weight (https://arxiv.org/abs/1608.05859)."""
    fp32_residual: bool = True
    """Keep the residual stream in float32 under a mixed precision, as autocast does by itself. False: in 16 bits, which
    moves fewer bytes between matrix products (Megatron-LM's default; its flag has the same name,
    fp32_residual_connection). Norms compute in float32 either way."""
    dropout: float = 0.0
    """Probability of dropping an activation: after the embedding, in the attention, after each sublayer."""
    init_std: float = 0.02
    """Standard deviation of the normal that linear and embedding weights are drawn from."""
    scale_residual_init: bool = True
    """Draw the projections that feed the residual stream with init_std / sqrt(2 n_layer), as GPT-2 does."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.n_layer > DEEPEST:
            raise ConfigurationError(f"n_layer is {self.n_layer}, but must be at most {DEEPEST:,}.")
        if self.n_kv_head is not None and self.n_kv_head < 1:
            raise ConfigurationError(f"n_kv_head is {self.n_kv_head}, but must be at least 1, or None for n_head.")
        if self.n_embd % self.n_head:
            raise ConfigurationError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: choose a multiple of n_head as n_embd."
            )
        if self.n_head % self.kv_heads:
            raise ConfigurationError(
                f"n_head {self.n_head} is not divisible by n_kv_head {self.kv_heads}: "
                "every key/value head must serve the same number of query heads."
            )
        if self.position == "rotary" and self.head_size % 2:
            raise ConfigurationError(
                f"rotary positions turn pairs of channels, so n_embd / n_head must be even, not {self.head_size}."
            )
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ConfigurationError(f"intermediate_size is {self.intermediate_size}: give a width, or None.")
        if not (0.0 < self.norm_eps < math.inf and 0.0 < self.rope_theta < math.inf):
            raise ConfigurationError(
                f"norm_eps is {self.norm_eps} and rope_theta {self.rope_theta}, but both must be positive."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigurationError(f"dropout is {self.dropout}, but must be in [0, 1).")
        if not 0.0 < self.init_std < math.inf:
            raise ConfigurationError(f"init_std is {self.init_std}, but must be positive.")

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads, resolved."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.n_embd // self.n_head

    @property
    def hidden_size(self) -> int:
        """Hidden width of the MLP, resolved."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 4 * self.n_embd if self.mlp == "gelu" else -(-8 * self.n_embd // 3 // 32) * 32

    @classmethod
    def gpt2(cls, **changes: Any) -> "GPTConfig":
        """Return GPT-2 124M, with any field changed by keyword."""
        return cls(**changes)

    @classmethod
    def llama(cls, **changes: Any) -> "GPTConfig":
        """Return Llama's shape: RMSNorm, rotary positions, SwiGLU, no biases, an untied head; 1.3B by default."""
        shape: dict[str, Any] = {
            "vocab_size": 32000,
            "block_size": 2048,
            "n_layer": 24,
            "n_head": 16,
            "n_embd": 2048,
            "norm": "rmsnorm",
            "position": "rotary",
            "mlp": "swiglu",
            "bias": False,
            "tie_embeddings": False,
        }
        return cls(**(shape | changes))

    @classmethod
    def tiny(cls, **changes: Any) -> "GPTConfig":
        """Return the shape of a GPT of some 30k parameters over bytes: for tests and for a first look."""
        shape: dict[str, Any] = {"vocab_size": 256, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}
        return cls(**(shape | changes))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. Every field is used. If the trainer decides something for you, it logs one line.

    Raises:
        ConfigurationError: if the settings do not fit each other.
    """

    updates: int = 1000
    """Number of optimizer updates."""
    microbatches: int = 1
    """Batches whose gradients are accumulated, per rank, into one update."""
    optimizer: str = "torch.optim.AdamW"
    """Class path of the optimizer, e.g. ``bitsandbytes.optim.AdamW8bit`` or ``grokadamw.GrokAdamW``."""
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    """Its keyword arguments (lr, betas, weight_decay, ...), handed over exactly. A misspelt one is an error."""
    optimizer_rest: str | None = None
    """Class path of a second optimizer, for all tensors but the matrices of the blocks, which ``optimizer`` then trains
    alone. None: torch.optim.AdamW beside torch.optim.Muon, which takes matrices only; beside others there is none."""
    optimizer_rest_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of that second optimizer, with a learning rate and a weight decay of its own."""
    decay: Literal["role", "ndim", "all"] = "role"
    """Which tensors decay. role: only matrices that multiply activations, not norms, biases, embeddings or memory
    tokens; ndim: tensors of two or more dimensions, as in nanoGPT; all: everything."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: a cosine down to min_lr; the peak and then a cooldown (warmup-stable-decay); or the peak
    throughout. See reference.training.schedule."""
    warmup: int = 0
    """Updates of linear warm-up, before the peak."""
    cooldown: int | None = None
    """Updates in which wsd decays to min_lr, at the end. None: a fifth of all updates."""
    min_lr: float | None = None
    """Learning rate of the last update, of each optimizer. None: a tenth of its peak."""
    clip: float | None = 1.0
    """Largest global gradient norm. None: not clipped."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "32-true"
    """Fabric's precision: ``-mixed`` keeps float32 weights and computes in 16 bits, ``bf16-true`` keeps 16 bits.
    Float16 weights (Fabric's 16-true) are not offered: AdamW's eps of 1e-8 is zero in float16, which gives 0 / 0."""
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Multiply in float8 in the linear layers of a GPT's blocks, with one scale for each tensor or for each row. Needs
    torchao, and an NVIDIA GPU of compute capability 8.9 (rowwise: 9.0) or higher. Weights, gradients, optimizer and
    checkpoints stay as ``precision`` has them, and so does the head."""
    logits: Literal["float32", "compute"] = "float32"
    """Dtype in which the model's logits come out: float32, or the dtype they were computed in. The loss is computed
    in float32 either way, so this is for those who use the logits; inside a compiled graph it makes no difference."""
    stable_embedding: bool = False
    """Train with bitsandbytes' StableEmbedding instead of nn.Embedding, if the optimizer is from bitsandbytes.
    Adds a LayerNorm behind the lookup, so it is for runs that start fresh. Exported models have plain embeddings."""
    initialization: Literal["auto", "eager", "meta"] = "auto"
    """How to build the model. eager: with its weights at once. meta: without memory, and materialised afterwards. auto:
    meta under FSDP, eager otherwise."""
    compile: bool = False
    """Compile the model and its loss, as one graph, with torch.compile."""
    activation_checkpointing: bool = False
    """Keep only the input of each transformer block for backward, and compute the block again there: less memory,
    and a second forward of each block. The gradients are the same, bit for bit."""
    seed: int = 1337
    """Seeds the weights (the same on every rank) and the dropout (another on every rank and update)."""
    accelerator: str = "auto"
    """Fabric's accelerator: auto, cpu, cuda, mps."""
    devices: int = 1
    """Processes per node."""
    num_nodes: int = 1
    """Number of nodes."""
    strategy: str = "auto"
    """Fabric's strategy: auto, ddp, fsdp, ..."""
    evaluate_every: int | None = None
    """Updates between evaluations; there is also one after the last update. None: never."""
    evaluate_batches: int | None = None
    """Validation batches per evaluation and rank: always the first ones, to make evaluations comparable. None: all."""
    save_every: int | None = None
    """Updates between checkpoints; there is also one after the last update. None: never."""
    keep_last: int | None = None
    """Checkpoints to keep; older ones of this directory are removed once a newer one is complete. None: all."""
    sample_every: int | None = None
    """Updates between samples of text from the model; there is also one after the last update. None: never."""
    log_every: int = 10
    """Updates between log lines (the first and the last are always logged)."""
    capture_step: InitVar[bool] = False
    """Removed after 0.1.0. Files of that release say ``false``, and can still be read."""

    def __post_init__(self, capture_step: bool) -> None:
        check_types(self)
        if capture_step is not False:
            raise ConfigurationError(
                f"capture_step is {capture_step!r}, but it was removed, because a captured step saved no time: "
                "leave it out."
            )
        if self.float8 != "none" and not self.precision.startswith("bf16"):
            raise ConfigurationError(
                f"float8 is {self.float8!r} and precision {self.precision!r}, but float8 goes with 'bf16-mixed' or "
                "'bf16-true': choose one of them, or leave float8 out."
            )
        for name in ("updates", "microbatches", "devices", "num_nodes", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        every = dict.fromkeys(("evaluate_every", "save_every", "sample_every"), "never")
        for name, none in (every | {"evaluate_batches": "all"}).items():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} is {value}: give a number of at least 1, or None for {none}.")
        if self.keep_last is not None and self.keep_last < 1:
            raise ConfigurationError(f"keep_last is {self.keep_last}: keep at least 1, or None for all.")
        if self.cooldown is not None and not 1 <= self.cooldown <= self.updates - self.warmup:
            raise ConfigurationError(
                f"cooldown is {self.cooldown}, but must lie between 1 and updates - warmup "
                f"({self.updates - self.warmup}), or be None."
            )
        if not 0 <= self.warmup <= self.updates:
            raise ConfigurationError(f"warmup is {self.warmup}, but must lie between 0 and updates ({self.updates}).")
        if not 0 <= self.seed < 1 << 32:  # what Fabric can seed numpy with
            raise ConfigurationError(f"seed is {self.seed}, but must lie between 0 and 2**32 - 1.")
        if self.min_lr is not None and not 0.0 <= self.min_lr < math.inf:
            raise ConfigurationError(f"min_lr is {self.min_lr}: give a rate of at least 0, or None for a tenth of lr.")
        if self.clip is not None and not self.clip > 0.0:
            raise ConfigurationError(f"clip is {self.clip}: give a positive norm, or None for no clipping.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on: a folder that ``python -m reference prepare`` wrote.

    Raises:
        ConfigurationError: if a number is out of range.
    """

    path: str = "data/standard-library"
    """Folder with the token files of the training and the validation split."""
    stream: str | None = None
    """Folder of text files that grow: train on them, each line once, and wait where text is missing. The data folder
    then gives tokenizer and validation split. null: train on the data folder."""
    microbatch_size: int = 8
    """Sequences per microbatch and rank; each has block_size tokens and one more as the last target."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.microbatch_size < 1:
            raise ConfigurationError(f"microbatch_size is {self.microbatch_size}, but must be at least 1.")
        for name in ("path", "stream"):
            if getattr(self, name) == "":  # such as a variable of the shell that is not set: not the current folder
                raise ConfigurationError(f"{name} is empty: give a folder.")


def check_types(config: Any) -> None:
    """Raise ConfigurationError if a field of a dataclass holds a value that its annotation does not allow.

    Dataclasses do not check their annotations; without this, ``norm="rms"`` would fail far from its cause.
    """
    for entry in fields(config):
        value = getattr(config, entry.name)
        if not allows(entry.type, value):
            raise ConfigurationError(f"{entry.name} is {shown(value)}, but must be {in_words(entry.type)}.")
        if isinstance(value, int) and abs(value) > LARGEST and entry.name != "seed":
            raise ConfigurationError(f"{entry.name} is {shown(value)}, but must lie between -2**40 and 2**40.")
        if isinstance(value, str | Path | list) and "\0" in str(value).replace("\\x00", "\0"):
            raise ConfigurationError(f"{entry.name} is {shown(value)}, but must not hold a NUL character.")
        if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
            key = next(key for key in value if not isinstance(key, str))
            raise ConfigurationError(f"{entry.name} has the key {shown(key)}, but its keys are names, such as lr.")


LARGEST = 1 << 40  # of whole numbers: what nothing here reaches, and machine arithmetic holds


def shown(value: Any) -> str:
    """Return a value as messages show it: cut short if it is long."""
    if isinstance(value, int) and abs(value) > 1 << 200:
        return "a number of more than 60 digits"  # Python writes none of more than 4,300
    try:
        text = repr(value)
    except RecursionError:
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:60]}..."


def check_saved(config: Mapping[str, Any]) -> None:
    """Raise ConfigurationError if the config.json of a checkpoint, which may be forged, has a value of a wrong type."""
    kinds: dict[str, Any] = {"model": Mapping, "train": Mapping, "tokenizer": str | NoneType}
    kinds |= {"sequences_per_update": int | NoneType, "end_of_document": int | NoneType, "format": int}
    kinds["finetune"] = Mapping | NoneType
    for key, kind in kinds.items():
        if key in config and not isinstance(config[key], kind):
            raise ConfigurationError(f"{key} is {shown(config[key])}, but must be {in_words(kind)}")


def allows(annotation: Any, value: Any) -> bool:
    """Return whether a value is of an annotated type. An int is a float, too; a bool is neither."""
    if get_origin(annotation) is Literal:
        return isinstance(value, str) and value in get_args(annotation)
    if get_origin(annotation) is UnionType:
        return any(allows(kind, value) for kind in get_args(annotation))
    if isinstance(value, bool):
        return annotation is bool
    return isinstance(value, int | float if annotation is float else get_origin(annotation) or annotation)


def in_words(annotation: Any) -> str:
    """Return how messages and help texts call an annotated type."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(annotation))
    if get_origin(annotation) is UnionType:
        return " or ".join(in_words(kind) for kind in get_args(annotation))
    kind = get_origin(annotation) or annotation
    return WORDS.get(kind, kind.__name__)


WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null (None)",
    Mapping: "a mapping, such as {lr: 3e-4}",
    list: "a list",
    Path: "a path",
}


def as_plain(config: Any) -> dict[str, Any]:
    """Return the configuration as a dictionary of plain values, as it is written beside a checkpoint."""
    values = {entry.name: getattr(config, entry.name) for entry in fields(config)}  # asdict() would copy any mapping
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
