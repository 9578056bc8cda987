"""The bench's training step: it does what Trainer.fit does, starts again where it began, and refuses wrong figures."""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.bench import measure, peers, training
from conformance.bench.case import Case, Prepared, Setting
from conformance.bench.measure import check_inputs
from conformance.bench.models import draw, random_batches, shape
from conformance.errors import Unavailable
from reference import GPT, GPTConfig, Trainer
from reference.cli.presets import PRESETS

CPU = Setting(torch.device("cpu"))
CASES = training.cases(CPU.device, quick=False)
NEEDS_GPU = {"PagedAdamW8bit"}
FACTS = {"tokens", "parameters", "flops_per_token", "flops_per_token_causal", "formula", "microbatch", "length"}
FACTS |= {"precision", "optimizer", "compiled", "host", "batches"}


def losses(prepared: Prepared, steps: int) -> list[float]:
    """The loss of each of so many steps."""
    found = []
    for _ in range(steps):
        prepared.step()
        found.append(float(prepared.later_facts()["last loss"]))
    return found


def runs_here(case: Case) -> bool:
    return not any(name in case.name for name in NEEDS_GPU)


@pytest.mark.parametrize(
    "case", [case for case in CASES if runs_here(case)], ids=lambda case: f"{case.size}: {case.name}"
)
def test_after_a_reset_every_row_begins_again(case: Case) -> None:
    prepared = case.build(CPU)
    first = losses(prepared, 3)
    prepared.reset()
    assert losses(prepared, 3) == first
    assert len(set(first)) == 3
    assert prepared.facts.keys() >= FACTS


@pytest.mark.parametrize("case", [case for case in CASES if not runs_here(case)], ids=lambda case: case.name)
def test_what_needs_a_gpu_says_so(case: Case) -> None:
    with pytest.raises(Unavailable, match="CUDA"):
        case.build(CPU)


def test_rows_that_share_compiled_code_stand_together() -> None:
    for rows in (training.GPT2_ROWS, training.LLAMA_ROWS):
        keys = [
            (r.train.compile, r.train.precision, r.train.stable_embedding, r.microbatch, str(r.model)) for r in rows
        ]
        changes = sum(a != b for a, b in itertools.pairwise(keys))
        assert changes == len(set(keys)) - 1
        priorities = [row.priority for row in rows]
        assert priorities == sorted(priorities)  # so that the order stays


def test_the_preset_is_measured_as_it_is() -> None:
    [row] = [row for row in training.GPT2_ROWS if row.note == training.PRESET]
    preset = PRESETS["gpt2-124m"]
    assert replace(shape("gpt2-124m"), **row.model) == preset.model
    assert row.microbatch == preset.data.microbatch_size
    for name in ("precision", "compile", "clip", "optimizer", "stable_embedding"):
        assert getattr(row.train, name) == getattr(preset.train, name)
    assert f"accumulates {preset.train.microbatches} microbatches" in row.note


def test_peers_and_reference_train_with_the_same_settings() -> None:
    """Batch, clip, precision and fused AdamW; what decays differs, and is stated."""
    plain = next(case for case in CASES if case.name.startswith(f"reference, {training.FUSED}")).build(CPU)
    assert plain.facts["decays"] == "70.8% of the parameters, in 2 groups"
    assert plain.facts["residual"] == "float32"
    assert {peer.microbatch for peer in peers.PEERS} == {training.GPT2_ROWS[0].microbatch, 64}
    for peer in peers.PEERS:
        own = peer.build is GPT
        if not own and importlib.util.find_spec(peer.package.replace("-", "_")) is None:
            continue
        other = peers.prepare(peer, shape("gpt2-tiny"), CPU)
        for name in ("tokens", "microbatch", "precision", "optimizer", "compiled", "clip", "batches"):
            assert other.facts[name] == plain.facts[name], name
        assert other.facts["decays"] == "100.0% of the parameters, in 1 group"
        check_inputs(other.inputs)
        assert len(other.inputs) == len(plain.inputs) == 8


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """Compilation on, but by a backend that only collects the graphs; a graph break is an error."""
    found: list[torch.fx.GraphModule] = []

    def collect(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=collect, fullgraph=True))
    for module in (training, peers):
        monkeypatch.setattr(module, "compiles", lambda _: True)
    measure.compiler_for.cache_clear()
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def test_the_same_model_is_compiled_once_for_all_its_optimizers(graphs: list[torch.fx.GraphModule]) -> None:
    """Otherwise each row of an optimizer would cost a compilation, and the run its time."""
    rows = [row for row in training.GPT2_ROWS if row.train.compile][:2]
    eight_bit = next(row for row in training.GPT2_ROWS if row.train.optimizer == training.EIGHT_BIT)
    for row in (*rows, eight_bit):
        prepared = training.prepare(row, shape("gpt2-tiny"), CPU)
        assert prepared.facts["logits"] == "inside the compiled graph"
        prepared.step()
        prepared.step()
    assert len(graphs) == 1
    training.prepare(replace(rows[0], train=training.TRUE), shape("gpt2-tiny"), CPU).step()
    assert len(graphs) == 2


def test_a_step_is_an_update_of_the_trainer() -> None:
    row, config = training.GPT2_ROWS[0], shape("gpt2-tiny")
    prepared = training.prepare(row, config, CPU)
    train = replace(row.train, updates=3, compile=False, accelerator="cpu")
    fitted = Trainer(partial(draw, config, CPU.device), train).fit(random_batches(config, 2, CPU.device))
    assert losses(prepared, 3) == [record.loss for record in fitted.records]


def test_the_rows_are_what_their_names_say() -> None:
    facts = {case.name: case.build(CPU).facts for case in CASES if runs_here(case) and case.size == "gpt2-tiny"}
    for name, found in facts.items():
        assert str(found["precision"]) in name
        assert (found["optimizer"] == "AdamW8bit") == ("AdamW8bit" in name)
        for implementation in ("fused", "foreach", "for-loop"):
            assert (found["optimizer"] == f"AdamW ({implementation})") == (f"AdamW {implementation}" in name)
        assert (found["embedding"] == "StableEmbedding") == ("StableEmbedding" in name)
        assert (found["logits"] == "float32 dtype") == ("float32 logits" in name)
        assert (found["compiled"] == "eager") == name.endswith("eager")
        assert (found["residual"] == "16 bits") == ("16-bit residual" in name)


def test_batches_are_random_and_differ() -> None:
    config = shape("gpt2-tiny")
    batches = random_batches(config, 4, CPU.device)
    assert [tuple(batch.shape) for batch in batches] == [(4, config.block_size + 1)] * 8
    assert len({batch.flatten()[:20].numpy().tobytes() for batch in batches}) == 8
    assert 0 <= min(int(b.min()) for b in batches) < 5
    assert config.vocab_size - 5 < max(int(b.max()) for b in batches) < config.vocab_size


@pytest.mark.parametrize("size", ["gpt2-tiny", "llama-tiny"])
def test_weights_drawn_on_the_device_follow_the_table(size: str) -> None:
    config = shape(size)
    model = draw(config, CPU.device)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(config.init_std, rel=0.1), name
        else:
            assert bool((parameter == (0.0 if name.endswith("bias") else 1.0)).all()), name
    names = dict(model.named_parameters(remove_duplicate=False))
    assert (names["head.weight"] is names["embedding.weight"]) == config.tie_embeddings
    loss = nn.functional.cross_entropy(model(torch.arange(8)[None]).flatten(0, 1), torch.arange(8, 16))
    assert loss.item() == pytest.approx(5.545, abs=0.1)  # ln 256: nothing is left uninitialised


# --- peers -----------------------------------------------------------------------------------------------------------

PEERS = pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)


def need(peer: peers.Peer) -> None:
    """Skip the test if the peer's library is not installed."""
    if peer.build is GPT:
        return
    name = peer.package.replace("-", "_")
    pytest.importorskip(name, reason=f"{peer.package} is not installed: pip install 'gpt-conformance[peers]'")


@PEERS
def test_a_peer_has_gpt2s_parameters(peer: peers.Peer) -> None:
    need(peer)
    config = GPTConfig.gpt2()
    with torch.device("meta"):
        model = peer.build(config)
        if callable(tie := getattr(model, "tie_weights", None)):
            tie()  # transformers 5.0 leaves that out on the meta device
        ours = sum(parameter.numel() for parameter in GPT(config).parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(ours, rel=0.02)


def test_a_peer_steps_in_bf16_and_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    class Watched(GPT):
        def forward(self, ids: Tensor, cache: Any = None) -> Tensor:
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return super().forward(ids, cache)

    clip = nn.utils.clip_grad_norm_

    def watched(parameters: list[Tensor], largest: float) -> Tensor:
        seen.append(largest)
        return clip(parameters, largest)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched)
    own = replace(peers.PEERS[2], package="torch", build=Watched, loss=peers.plain_loss)
    prepared = peers.prepare(own, shape("gpt2-tiny"), CPU)
    prepared.step()
    assert seen == [(True, torch.bfloat16), 1.0]
    assert prepared.facts["optimizer"] == "AdamW (fused)"


@PEERS
def test_a_peer_learns_and_begins_again(peer: peers.Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    need(peer)
    batch = random_batches(shape("gpt2-tiny"), 2, CPU.device)[0]
    monkeypatch.setattr(peers, "random_batches", lambda *_: [batch])
    monkeypatch.setattr(peers, "ADAMW", training.ADAMW | {"lr": 1e-2})
    prepared = peers.prepare(peer, shape("gpt2-tiny"), CPU)
    first = losses(prepared, 8)
    assert first[0] == pytest.approx(5.545, abs=0.1)  # ln 256: in nats per token, and unbiased at the start
    assert first[-1] < first[0] - 1.0
    prepared.reset()
    assert losses(prepared, 8) == first
    assert prepared.facts.keys() >= FACTS | {"library", "note"}


@PEERS
def test_a_peer_compiles_in_one_graph_with_causal_attention_without_a_mask(
    peer: peers.Peer, graphs: list[torch.fx.GraphModule]
) -> None:
    """A mask would keep SDPA from the flash kernel, and a graph break would cost each step: no accidental handicap."""
    need(peer)
    prepared = peers.prepare(peer, shape("gpt2-tiny"), CPU)
    prepared.step()
    prepared.step()
    assert len(graphs) == 1
    calls = [n for n in graphs[0].graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    assert [(call.kwargs.get("attn_mask"), call.kwargs["is_causal"]) for call in calls] == [(None, True)] * 2
    assert peer.compiles_loss == any("cross_entropy" in str(node.target) for node in graphs[0].graph.nodes)


def test_a_peer_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(config: GPTConfig) -> nn.Module:
        raise ModuleNotFoundError("No module named 'litgpt'")

    peer = replace(peers.PEERS[0], build=missing)
    with pytest.raises(Unavailable, match=r"No module named 'litgpt'\): pip install 'gpt-conformance\[peers\]'"):
        peers.prepare(peer, shape("gpt2-tiny"), CPU)
