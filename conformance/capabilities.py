"""What a stack may lack: the names that an adapter's ``lacks`` uses, and what each of them means."""

import difflib
from dataclasses import dataclass

from conformance.errors import UnknownCapability


@dataclass(frozen=True)
class Capability:
    """Something that a stack can do, or be asked to do."""

    description: str
    """Completes the sentence "The stack ..."."""
    since: str = "0.1"
    """The version of the suite that asks for it first."""
    extension: bool = False
    """An option that most stacks do not have; clauses that need it are told apart from the core."""
    implied: bool = False
    """Nearly every stack has it, and adapters written before it had a name are taken to claim it."""


CAPABILITIES = {
    "llama-shape": Capability("trains a model with RMSNorm, SwiGLU and no biases"),
    "gpt-shape": Capability("trains a model with LayerNorm, a GELU MLP and biases"),
    "tied": Capability("can share the embedding's weight with the head"),
    "foreign-module": Capability("trains any module that maps token ids (B, T) to logits (B, T, V)", extension=True),
    "microbatches": Capability("accumulates the gradients of several microbatches into an update"),
    "batch-total": Capability(
        "is told how many sequences an update has, and finds the number of microbatches by itself", extension=True
    ),
    "ignored-targets": Capability("accepts targets of -100, which it leaves out of the loss"),
    "clip": Capability("clips the global norm of the gradients"),
    "schedule": Capability("warms the learning rate up and lowers it along a cosine"),
    "dropout": Capability("has a model with dropout"),
    "sampler": Capability("shuffles a data set by itself, and sees each sample once in every epoch"),
    "fused": Capability("asks for the optimizer's fused kernel on the device of the run", extension=True),
    "ndim-policy": Capability("can be told to decay only tensors of two or more dimensions", extension=True),
    "resume": Capability("goes on from a checkpoint that it wrote"),
    "evaluate": Capability("evaluates on validation data after the last update"),
    "evaluate-every": Capability("also evaluates during training, after every given number of updates"),
    "load": Capability("has load(checkpoint), which returns a plain eager module"),
    "bf16-mixed": Capability("computes in bfloat16 with float32 weights"),
    "bf16-true": Capability("keeps weights in bfloat16"),
    "16-mixed": Capability("computes in float16 with float32 weights"),
    "logits-opt-out": Capability("can be told to leave logits in the dtype they were computed in", extension=True),
    "stable-embedding": Capability("can train with bitsandbytes' StableEmbedding", extension=True),
    "finetune": Capability(
        "starts from the weights of a checkpoint, keeps them frozen, and trains LoRA adapters beside them",
        since="0.2",
        extension=True,
    ),
    "quantised": Capability(
        "keeps the frozen weights of linear layers in 4 or 8 bits by bitsandbytes while it fine-tunes",
        since="0.2",
        extension=True,
    ),
    "meta-init": Capability(
        "can build the model on the meta device and materialise it afterwards, on one device", extension=True
    ),
    "activation-checkpointing": Capability(
        "can recompute activations in the backward instead of keeping them", extension=True
    ),
    "compile": Capability("has torch.compile as an option", extension=True),
    "two-ranks": Capability("trains on two CPU processes with gloo"),
    "sharded": Capability(
        "splits parameters over two CPU processes with gloo: by fully_shard (FSDP2), or by tensor parallelism",
        since="0.2",
        extension=True,
    ),
    "grouped-query": Capability(
        "can have fewer heads of keys and values than of queries (grouped-query attention)", since="0.2", extension=True
    ),
    "initial-std": Capability(
        "takes the standard deviation of its initial weights from its user", since="0.2", extension=True
    ),
    "rotary-base": Capability("takes the base of its rotary positions from its user", since="0.2", extension=True),
    "norm-eps": Capability("takes the epsilon of its norms from its user", since="0.2", extension=True),
    "second-optimizer": Capability(
        "takes from its user a second optimizer, for the tensors that the first is not for", since="0.2", extension=True
    ),
    "decay-all": Capability("can be told to decay every tensor", since="0.2", extension=True),
    "cooldown": Capability(
        "can keep the learning rate constant and lower it in a given number of updates at the end",
        since="0.2",
        extension=True,
    ),
    "loader": Capability(
        "trains on a shuffling torch DataLoader that its user hands over, epoch after epoch",
        since="0.2",
        extension=True,
    ),
    "keep-last": Capability("removes all but a given number of its newest checkpoints", since="0.2", extension=True),
    "finds-newest": Capability(
        "finds the newest checkpoint in the directory of a run by itself, and goes on from it",
        since="0.2",
        extension=True,
    ),
    "ignored-validation": Capability(
        "accepts targets of -100 in validation data, which it leaves out of the validation loss", since="0.2"
    ),
    "evaluate-batches": Capability(
        "can be told how many validation batches an evaluation takes, and takes the same ones each time",
        since="0.2",
        extension=True,
    ),
    "validation-document": Capability(
        "divides a validation document into windows by itself", since="0.2", extension=True
    ),
    "final-evaluation": Capability(
        "evaluates after the last update, whatever the interval between evaluations", since="0.2", extension=True
    ),
    "masked-samples": Capability(
        "shuffles a data set in which only some tokens are targets, such as the assistant's in chats",
        since="0.2",
        extension=True,
    ),
    "chats": Capability(
        "turns chats into tokens by a tokenizer's own chat template, and trains on what the assistant says",
        since="0.2",
        extension=True,
    ),
    "module-factory": Capability(
        "builds the module of somebody else's itself, from a function that its user names or hands over",
        since="0.2",
        extension=True,
    ),
    "residual-opt-out": Capability(
        "can be told to keep the residual stream in 16 bits in a mixed precision", since="0.2", extension=True
    ),
    "lora-dropout": Capability("can drop inputs of the LoRA adapters at random", since="0.2", extension=True),
    "lora-everywhere": Capability(
        "adds LoRA adapters to every linear layer of the blocks, in attention and MLP", since="0.2", extension=True
    ),
    "tuned-embedding": Capability(
        "can train the embedding's weights beside the LoRA adapters", since="0.2", extension=True
    ),
    "any-optimizer": Capability("takes the optimizer's class from its user", since="0.2", implied=True),
    "keywords": Capability("takes the optimizer's keyword arguments from its user", since="0.2", implied=True),
    "builds-optimizer": Capability(
        "builds the optimizer by itself, from a class and keyword arguments", since="0.2", implied=True
    ),
    "untied": Capability("can give the head a weight of its own", since="0.2", implied=True),
    "seed": Capability("takes a seed from its user", since="0.2", implied=True),
    "float32-logits": Capability("converts logits to float32 where they leave the model", since="0.2", implied=True),
}
"""Everything that is not in a subject's ``lacks`` is claimed."""


def everything_but(*claimed: str, reason: str) -> dict[str, str]:
    """Return ``lacks`` for a stack that has little: every capability but the claimed ones, all with one reason.

    Capabilities that nearly every stack has (``implied``) stay claimed: name them beside if the stack lacks them.

    Raises:
        UnknownCapability: if a claimed capability is unknown.
    """
    unknown = set(claimed) - set(CAPABILITIES)
    if unknown:
        names = ", ".join(map(repr, sorted(unknown)))
        raise UnknownCapability(f"unknown capability {names}: {nearest(min(unknown))}")
    return {name: reason for name, it in CAPABILITIES.items() if name not in claimed and not it.implied}


def nearest(wanted: object) -> str:
    """Return a clause for messages that names the capabilities most like one that does not exist."""
    found = difflib.get_close_matches(str(wanted)[:80], CAPABILITIES, n=3, cutoff=0.0)
    return f"the nearest are {', '.join(found)}; docs/adapters.md names all."
