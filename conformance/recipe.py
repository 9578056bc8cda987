"""A recipe: what a subject is asked to train. Plain data, frozen and hashable, so equal recipes run once."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from conformance.chats import conversations, write_tokenizer
from conformance.choice import OptimizerChoice as OptimizerChoice  # adapters import it from here
from conformance.tokens import DATA_SEED, Alteration, alter, ignore_some, ignore_stretches, random_ids

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader

    from conformance.recording.trace import Checkpoint

Shape = Literal["gpt", "llama"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Dropping = Literal["everywhere", "nowhere", "at one place"]
Quantisation = Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]
QUANTISATIONS: tuple[Quantisation, ...] = get_args(Quantisation)

_reported: ContextVar[list[tuple[dict[str, float], int | None]] | None] = ContextVar("reported", default=None)


@contextmanager
def collect_reports() -> Iterator[list[tuple[dict[str, float], int | None]]]:
    """Collect the metrics that adapters hand over inside."""
    reports: list[tuple[dict[str, float], int | None]] = []
    token = _reported.set(reports)
    try:
        yield reports
    finally:
        _reported.reset(token)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One tiny training run.

    An adapter maps every field onto its stack's own settings. If the stack has no setting for a field, the adapter must
    name the field's capability in ``lacks``; the suite then never asks for it.
    """

    shape: Shape = "gpt"
    """gpt: LayerNorm, GELU, biases. llama: RMSNorm, SwiGLU, no biases. The stack chooses how it encodes positions."""
    module: str | None = None
    """``package.module:function`` that builds the module to train instead of the stack's own model
    (capability foreign-module). It maps token ids (B, T) to logits (B, T, V)."""
    n_layer: int = 2
    n_head: int = 2
    n_kv_head: int | None = None
    """Heads of keys and values, each for as many query heads as any other (capability grouped-query). None: n_head."""
    n_embd: int = 32
    vocab_size: int = 128
    """128 x 32 are 4096 elements: the smallest table for which bitsandbytes keeps 8-bit state."""
    block_size: int = 16
    """Tokens per sequence; each row of a batch has one more, the last target."""
    tied: bool = False
    """The head shares the weight of the embedding."""
    dropout: float = 0.0
    """Probability of dropping an activation, wherever the stack drops some (capability dropout)."""
    initial_std: float | None = None
    """Standard deviation that the weights are drawn with (capability initial-std). None: the stack's own."""
    rotary_base: float | None = None
    """Base of the wavelengths of rotary positions (capability rotary-base). None: the stack's own."""
    norm_eps: float | None = None
    """What the norms add to the variance that they divide by (capability norm-eps). None: the stack's own."""
    seed: int = 1
    """Decides the weights, the dropout and the order of samples."""
    precision: Precision = "32-true"
    """Fabric's names: -mixed keeps float32 weights and computes in 16 bits, -true keeps 16-bit weights."""
    optimizer: OptimizerChoice = field(default_factory=OptimizerChoice)
    rest: OptimizerChoice | None = None
    """Optimizer of the tensors that ``optimizer`` is not for (capability second-optimizer). None: the stack's own."""
    microbatch_size: int = 2
    """Sequences per microbatch."""
    microbatches: int = 1
    """Microbatches per update and rank (more than one: capability microbatches)."""
    batch_total: int | None = None
    """Sequences per update, for a stack that is told this number and finds ``microbatches`` by itself (capability
    batch-total). Only set if it is not a multiple of ``microbatch_size``."""
    samples: int | None = None
    """The stack itself draws shuffled microbatches from a data set of this many samples, which document() and dataset()
    give (capability sampler). None: it takes batches() in order."""
    shuffled_by: Literal["stack", "loader"] = "stack"
    """loader: the samples are in loader(), a DataLoader that shuffles, and the stack is handed that one (capability
    loader)."""
    masked_samples: bool = False
    """Beside ``samples``: only some tokens of the data set are targets, as in chats only those of the assistant: see
    dataset_labels() (capability masked-samples)."""
    chats: bool = False
    """Train on conversations(), which the stack itself turns into tokens and targets, by the tokenizer and the chat
    template that write_tokenizer() writes: a target is what the assistant says (capability chats). The vocabulary has
    room for that tokenizer, and ``block_size`` for each conversation."""
    ignored_targets: bool = False
    """Many targets are -100, in some microbatches more than in others: see labels() (capability ignored-targets)."""
    updates: int = 2
    """Optimizer updates."""
    warmup: int = 0
    """Updates of linear warm-up (capability schedule)."""
    minimum_lr: float | None = None
    """Learning rate that a cosine reaches at the end (capability schedule). None: constant after the warm-up."""
    cooldown: int | None = None
    """Instead of the cosine, the rate is constant until so many updates before the end, and only then falls to
    ``minimum_lr`` (capability cooldown)."""
    clip: float | None = None
    """Largest global gradient norm (capability clip). None: do not clip, or set a limit that is never reached."""
    decay: Literal["declared", "ndim", "all"] = "declared"
    """declared: the stack's own policy. ndim: tensors of two and more dimensions decay (capability ndim-policy). all:
    every tensor decays (capability decay-all)."""
    evaluate: bool = False
    """Evaluate on validation_batches() after the last update (capability evaluate)."""
    evaluate_every: int | None = None
    """Updates between evaluations (capability evaluate-every). If they do not divide ``updates``, the stack also
    evaluates after the last one (capability final-evaluation)."""
    evaluate_batches: int | None = None
    """Validation batches of each evaluation and rank, always the same, of one more that there are (capability
    evaluate-batches). None: all."""
    ignored_validation: bool = False
    """Many targets of the validation data are -100: see validation_labels() (capability ignored-validation)."""
    validation: Literal["batches", "document"] = "batches"
    """document: the stack itself divides validation_document() into windows of ``block_size`` tokens, and evaluates
    them on all ranks together (capability validation-document)."""
    save_every: int | None = None
    """Updates between checkpoints. None: whatever the stack does by itself."""
    keep_last: int | None = None
    """Checkpoints to keep; older ones are removed (capability keep-last). None: all, or whatever the stack keeps."""
    resume: "Checkpoint | None" = None
    """Go on from this checkpoint, to ``updates`` in all (capability resume)."""
    find_newest: bool = False
    """Beside ``resume``: the stack is told the directory of the run that wrote that checkpoint, and must find it there,
    as the newest of several, by itself (capability finds-newest)."""
    stable_embedding: bool = False
    """Switch the stack's StableEmbedding option on (capability stable-embedding)."""
    finetune: "Checkpoint | None" = None
    """Start from the weights of this checkpoint, which the stack wrote in an earlier run of the same shape, with a
    fresh optimizer: freeze them, and train LoRA adapters beside the linear layers of the blocks. With
    ``stable_embedding``, the embedding is trained too (capability finetune)."""
    lora_rank: int = 4
    """Rank of the adapters."""
    lora_dropout: float = 0.0
    """Probability of dropping an input of the adapters (capability lora-dropout)."""
    tuned_embedding: bool = False
    """Fine-tuning trains the embeddings too, beside the adapters (capability tuned-embedding)."""
    quantised: Quantisation | None = None
    """Keep the frozen linear layers of the blocks in bitsandbytes' 4 or 8 bits; -dq quantises the scales too
    (capability quantised)."""
    logits: Literal["float32", "compute"] = "float32"
    """compute: let the logits leave in the dtype they were computed in (capability logits-opt-out)."""
    residual: Literal["float32", "compute"] = "float32"
    """compute: in a mixed precision, keep the residual stream in 16 bits (capability residual-opt-out)."""
    initialization: Literal["eager", "meta"] = "eager"
    """meta: build on the meta device and materialise afterwards, as FSDP does (capability meta-init)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward instead of keeping them (capability activation-checkpointing)."""
    compile: bool = False
    """Train through torch.compile (capability compile). A recorded run keeps it eager; PREC-9 lets it compile."""
    world_size: int = 1
    """Ranks, on the CPU with gloo, started by the suite with torchrun's environment variables."""
    sharded: bool = False
    """Split each parameter, its gradient and its optimizer state over the ranks, as FSDP2 does (capability sharded)."""
    zero_gradients: bool = False
    """The recorder zeroes every gradient on entry to ``step``: what moves then is weight decay."""
    nan_gradient: int | None = None
    """The recorder puts a NaN into the gradients of this update, counted from 0, when their backward has ended."""
    dropping: Dropping = "everywhere"
    """Where the recorder lets torch's dropout act; elsewhere it keeps every activation, scaled as those that it keeps.
    at one place: in one call of it in each update, the first call in the first update, the second in the second."""
    same_batches: bool | Literal["but the first"] = False
    """Not for the adapter: every update trains on the sequences of the first; "but the first": on those of the
    second."""
    altered: Alteration | None = None
    """Not for the adapter: which of the tokens in batches() are changed. "later tokens": the second half of each
    sequence; "first token": the first of each; "other sequences": every second sequence; "equal sequences": all, to
    the first sequence; "exchanged tokens": the two before the last that goes into the model, with each other; "unknown
    token": one in the middle of the first sequence, to an id that the vocabulary does not have."""
    uneven: bool = False
    """Not for the adapter: the last microbatch of each update has one sequence less, and so has the last validation
    batch."""
    validate_on_training: bool = False
    """Not for the adapter: validation_batches() are the first two of batches()."""
    repeat: int = 0
    """Not for the adapter: another number makes an equal recipe run again."""
    directory: Path = field(default=Path(), compare=False)
    """Where the run may write. Set by the suite."""

    @property
    def update_size(self) -> int:
        """Sequences per update, over all microbatches and ranks."""
        return self.batch_total or self.microbatch_size * self.microbatches * self.world_size

    def batches(self, rank: int = 0) -> "list[torch.Tensor]":
        """Return training data of one rank: tensors of token ids (microbatch_size, block_size + 1), int64.

        ``updates * microbatches`` of them; one may have fewer sequences than the others. How an update is split, into
        microbatches and over ranks, does not change which sequences it has.
        """
        return self._cut(self._split(self._repeated(self._sequences()), rank))

    def labels(self, rank: int = 0) -> "list[torch.Tensor]":
        """Return the targets: batches(), with -100 for each token to ignore under ``ignored_targets``.

        The first token of a sequence is never a target, so a stack that shifts the targets can ignore it.
        """
        tokens = self._sequences()
        if self.ignored_targets:
            tokens = ignore_some(tokens, stream=2)
        return self._cut(self._split(self._repeated(tokens), rank))

    def validation_batches(self, rank: int = 0) -> "list[torch.Tensor]":
        """Return validation data of one rank: two tensors like those of batches(), of other tokens.

        The last one may have fewer sequences. Under ``evaluate_batches`` there is one batch more than that.
        """
        if self.validate_on_training:
            return self.batches(rank)[:2]
        count = 2 if self.evaluate_batches is None else self.evaluate_batches + 1
        found = self._split(self._tokens(count * self.world_size * self.microbatch_size, stream=0), rank)
        return [*found[:-1], found[-1][:-1]] if self.uneven else found

    def validation_labels(self, rank: int = 0) -> "list[torch.Tensor]":
        """Return the targets: validation_batches(), with -100 for each token to ignore under ``ignored_validation``.

        In the first half of the sequences of rank 0 that is all but one; other ranks have all of their targets.
        """
        import torch

        batches = self.validation_batches(rank)
        tokens = torch.cat(batches)
        if self.ignored_validation and rank == 0:
            tokens[: len(tokens) // 2, 2:] = -100
        return list(tokens.split([len(batch) for batch in batches]))

    def validation_document(self) -> "torch.Tensor":
        """Return validation data as one document: eight windows of ``block_size`` tokens and a third of one, int64.

        No id is 0, so it can fill up the last window; none is ``vocab_size - 1``, which may be appended as its end.
        """
        return random_ids(1, self.vocab_size - 1, (8 * self.block_size + self.block_size // 3,), stream=5)

    def document(self) -> "torch.Tensor":
        """Return training data as one document: ``samples * block_size`` token ids below ``vocab_size - 1``, int64.

        If a stack appends the id ``vocab_size - 1`` as the end of the document, it can cut it into the samples of
        dataset(): ``samples`` sequences of ``block_size`` tokens, each with the next token.
        """
        assert self.samples is not None, "the recipe has no data set: it has batches()"
        return random_ids(0, self.vocab_size - 1, (self.samples * self.block_size,), stream=3)

    def dataset(self) -> "torch.Tensor":
        """Return training data as samples (samples, block_size + 1), int64; each begins where another ends."""
        import torch

        end = torch.tensor([self.vocab_size - 1])
        return torch.cat((self.document(), end)).unfold(0, self.block_size + 1, self.block_size)

    def dataset_labels(self) -> "torch.Tensor":
        """Return the targets: dataset(), with -100 for each token that is none under ``masked_samples``.

        Targets and others alternate in stretches of two to five tokens; the end of the document is a target.
        """
        rows = self.dataset()
        return ignore_stretches(rows, self.block_size, stream=6) if self.masked_samples else rows

    def conversations(self) -> list[list[dict[str, str]]]:
        """Return chats: for each the messages, ``{"role": "user" or "assistant", "content": ...}``, which alternate."""
        return conversations(DATA_SEED + 7)

    def write_tokenizer(self, folder: Path) -> Path:
        """Write a tokenizer of 128 ids with its chat template for conversations(); return the path of tokenizer.json.

        Beside it lie tokenizer_config.json and chat_template.jinja. Each turn ends with ``<|endoftext|>``.
        """
        return write_tokenizer(folder)

    def loader(self) -> "DataLoader[torch.Tensor]":
        """Return a DataLoader of microbatches of dataset(), which it shuffles anew, by torch's seed, in every pass."""
        from torch.utils.data import DataLoader

        rows: Any = list(self.dataset())
        return DataLoader(rows, self.microbatch_size, shuffle=True)

    def _sequences(self) -> "torch.Tensor":
        """Return the tokens of all updates (or of one or two, if they are repeated), microbatches and ranks."""
        count = self.updates if not self.same_batches else 1 if self.same_batches is True else 2
        tokens = self._tokens(count * self.update_size, stream=1)
        return tokens if self.altered is None else alter(tokens, self.altered, self.vocab_size)

    def _cut(self, batches: "list[torch.Tensor]") -> "list[torch.Tensor]":
        """Return microbatches of which, under ``uneven``, the last of each update has one sequence less."""
        if not self.uneven:
            return batches
        return [batch[:-1] if (n + 1) % self.microbatches == 0 else batch for n, batch in enumerate(batches)]

    def _repeated(self, tokens: "torch.Tensor") -> "torch.Tensor":
        """Return the tokens for all updates."""
        import torch

        if not self.same_batches:
            return tokens
        *earlier, repeated = tokens.split(self.update_size)
        return torch.cat([*earlier, repeated.repeat(self.updates - len(earlier), 1)])

    def _split(self, tokens: "torch.Tensor", rank: int) -> "list[torch.Tensor]":
        """Return the microbatches of one rank."""
        return list(tokens.split(self.microbatch_size))[rank :: self.world_size]

    def _tokens(self, count: int, stream: int) -> "torch.Tensor":
        """Return random sequences, (count, block_size + 1)."""
        return random_ids(0, self.vocab_size, (count, self.block_size + 1), stream)

    def report(self, metrics: "Mapping[str, float]", step: int | None = None) -> None:
        """Pass on what the stack's logger got, if the stack neither prints it nor writes CSV or TensorBoard files.

        Args:
            metrics: by name, such as ``{"train_loss": 2.1, "lr": 1e-3}``.
            step: the update, counted from 1.
        """
        reported = _reported.get()
        if reported is not None:
            reported.append((dict(metrics), step))

    def missing_checkpoint(self) -> "Checkpoint":
        """Return a checkpoint that does not exist, to see what a stack does about it."""
        from conformance.recording.trace import Checkpoint

        return Checkpoint(update=1, files=(), folder=Path(tempfile.gettempdir()) / "no-such-checkpoint")
