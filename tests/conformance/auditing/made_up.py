"""A small healthy run as an audit would have seen it, for tests to spoil: four updates of SGD with two microbatches."""

import math

import torch
from torch import Tensor

from conformance.auditing.facts import Backward, Clip, Facts, Given, Probed, Said
from conformance.auditing.noticed import Load, Read
from conformance.recording.trace import (
    CrossEntropy,
    EmbeddingInfo,
    Forward,
    Group,
    Loss,
    Measures,
    Named,
    Step,
    TensorInfo,
    Update,
)

V, WIDTH, ROWS, LENGTH, UPDATES, MICROBATCHES, RATE = 64, 4, 3, 12, 4, 2, 0.5
SGD = ("torch.optim.sgd.SGD", "torch.optim.optimizer.Optimizer")
OWNERS = {"wte.weight": "Embedding", "h.0.weight": "Linear", "norm.weight": "LayerNorm", "head.weight": "Linear"}
SHAPES = {"wte.weight": (V, WIDTH), "h.0.weight": (WIDTH, WIDTH), "norm.weight": (WIDTH,), "head.weight": (V, WIDTH)}


def measures(tensors: dict[str, Tensor]) -> Measures:
    """Return figures of whole tensors."""
    bits = Named({name: torch.hash_tensor(tensor) for name, tensor in tensors.items()})
    return Measures(Named({name: tensor.float().norm() for name, tensor in tensors.items()}), bits)


def step(names: tuple[str, ...] = tuple(SHAPES), optimizer: tuple[str, ...] = SGD, **settings: object) -> Step:
    """Return a step of one optimizer with one group."""
    given = {"lr": RATE, "momentum": 0.0, "weight_decay": 0.0, **settings}
    return Step(optimizer, (Group(names, given),), autocast=False, evaluations=0)


def entropy(ids: Tensor, targets: Tensor, update: int, grad: bool = True) -> CrossEntropy:
    """Return a mean cross entropy near that of a uniform guess."""
    value = torch.tensor(math.log(V) + 0.001 * float(ids.sum() % 97))
    return CrossEntropy(update, targets.flatten(), -100, "mean", 0.0, torch.float32, value, grad)


def given(number: int) -> Given:
    """Return figures of logits."""
    return Given(number, "cross_entropy", torch.float32, torch.tensor(-2.0), torch.ones(8) * 7, torch.ones(8) * 4)


def mean_loss(facts: Facts, update: int) -> float:
    """Return the loss of an update."""
    own = [e.value.item() for e in facts.trace.entropies if e.grad_enabled and e.update == update]
    return sum(own) / len(own)


def healthy(rank: int = 0, world: int = 1, seed: int = 0) -> Facts:
    """Return the facts of one process."""
    draw = torch.Generator().manual_seed(seed + rank)
    shared = torch.Generator().manual_seed(seed + 1000)
    facts = Facts(rank=rank, world=world)
    trace = facts.trace
    weights = {name: 0.02 * torch.randn(shape, generator=shared) for name, shape in SHAPES.items()}
    trace.tensors = Named({n: TensorInfo(n, (n,), s, torch.float32, "cpu", True, OWNERS[n]) for n, s in SHAPES.items()})
    trace.embeddings = (EmbeddingInfo("wte", "torch.nn.Embedding", (V, WIDTH), (), torch.float32, "cpu"),)
    trace.initial, trace.measured_initial = Named(weights), measures(weights)
    facts.tied_at_end = {name: (name,) for name in SHAPES}
    facts.leaves = set(SHAPES)
    facts.dropout, facts.generators = {"drop": True}, {"cpu": 17 + rank}
    facts.noticed.states = [100 + rank, 101 + rank, 102 + rank, 103 + rank]
    facts.noticed.evaluations = 1
    facts.probed = Probed(looks_ahead=-1, rows_mix=False, uses_context=True)
    if world > 1:
        facts.wrappers = ("DistributedDataParallel",)
    for update in range(UPDATES):
        gradients = {name: torch.randn(shape, generator=shared) for name, shape in SHAPES.items()}
        for micro in range(MICROBATCHES):
            rows = torch.randint(V, (ROWS, LENGTH + 1), generator=draw)
            ids, targets = rows[:, :-1], rows[:, 1:]
            forward = Forward(update, ids, None, training=True, grad_enabled=True, autocast=None)
            trace.forwards.append(forward)
            trace.entropies.append(entropy(ids, targets, update))
            facts.given.append(given(len(facts.backwards)))
            loss = trace.entropies[-1].value / MICROBATCHES
            part = {name: g * (1.0 if micro else 0.4) for name, g in gradients.items()}
            facts.backwards.append(Backward(update, [loss], measures(part).norms))
            trace.losses.append(Loss(update, loss, autocast=False))
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        facts.clips.append(Clip(update, MICROBATCHES, tuple(SHAPES), 1e3, "norm", norm))
        after = {name: tensor - RATE * gradients[name] for name, tensor in weights.items()}
        trace.updates.append(
            Update(
                steps=(step(),),
                gradients=Named(gradients),
                before=Named(weights),
                after=Named(after),
                state_before={},
                state_after={},
                measured_gradients=measures(gradients),
                measured_before=measures(weights),
                measured_after=measures(after),
            )
        )
        facts.leftovers[update] = {}
        if world == 1:
            facts.said.append(Said(update + 1, f"step {update + 1} loss {mean_loss(facts, update):.5f} lr {RATE:.3e}"))
        weights = after
    rows = torch.randint(V, (ROWS, LENGTH + 1), generator=draw)
    trace.forwards.append(Forward(UPDATES, rows[:, :-1], None, training=False, grad_enabled=False, autocast=None))
    trace.entropies.append(entropy(rows[:, :-1], rows[:, 1:], UPDATES, grad=False))
    facts.given.append(given(len(facts.backwards)))
    return facts


def resumed() -> Facts:
    """Return the facts of a run that goes on from a checkpoint."""
    facts = healthy()
    facts.noticed.reads = [Read(moments=4, rates=[RATE], peaks=[0.8], generators=[5], counted=True)]
    facts.noticed.restored = [5]
    facts.noticed.loads = [Load("GPT", 4, 4, 0)]
    facts.noticed.loaded = 4
    moments = {name: {"exp_avg": torch.ones(2)} for name in SHAPES}
    set_update(facts, 0, state_before=moments, state_after=moments)
    return facts


def set_update(facts: Facts, number: int, **changes: object) -> None:
    """Change fields of one update."""
    facts.trace.updates[number] = Update(**{**vars(facts.trace.updates[number]), **changes})  # type: ignore[arg-type]  # the fields are those of an Update


def set_all(facts: Facts, **changes: object) -> None:
    """Change fields of all updates."""
    for number in range(len(facts.updates)):
        set_update(facts, number, **changes)


def set_info(facts: Facts, name: str, **changes: object) -> None:
    """Change what is known of one tensor."""
    facts.trace.tensors[name] = TensorInfo(**{**vars(facts.trace.tensors[name]), **changes})  # type: ignore[arg-type]  # the fields are its own


def set_entropies(facts: Facts, grad: bool = True, **changes: object) -> None:
    """Change fields of all cross entropies of training, or of evaluation."""
    facts.trace.entropies = [
        CrossEntropy(**{**vars(e), **changes}) if e.grad_enabled == grad else e  # type: ignore[arg-type]  # the fields are its own
        for e in facts.trace.entropies
    ]


def set_forwards(facts: Facts, grad: bool = True, **changes: object) -> None:
    """Change fields of all forwards of training, or of evaluation."""
    facts.trace.forwards = [
        Forward(**{**vars(f), **changes}) if f.grad_enabled == grad else f  # type: ignore[arg-type]  # the fields are its own
        for f in facts.trace.forwards
    ]


def set_targets(facts: Facts, grad: bool, shift: int) -> None:
    """Make the targets of training, or of evaluation, tokens that lie ``shift`` places ahead."""
    forwards = [forward for forward in facts.trace.forwards if forward.grad_enabled == grad]
    places = [place for place, entropy in enumerate(facts.trace.entropies) if entropy.grad_enabled == grad]
    for forward, place in zip(forwards, places, strict=True):
        targets = forward.ids.roll(-shift, 1).flatten()
        facts.trace.entropies[place] = CrossEntropy(**{**vars(facts.trace.entropies[place]), "targets": targets})
