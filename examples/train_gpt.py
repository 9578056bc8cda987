"""Ten lines train our GPT, on the sources of this Python's own standard library."""

from pathlib import Path

from reference import GPTConfig, TokenData, TrainConfig, Trainer, load_tokenizer
from reference.data.prepare import prepare
from reference.model.generation import generate


def main(folder: Path, updates: int = 200) -> str:
    prepare([], "bytes", folder / "data", progress=False)
    sizes = {"block_size": 64, "microbatch_size": 16, "seed": 1}
    train, validation = (TokenData(folder / "data", split, **sizes) for split in ("train", "validation"))
    shape = GPTConfig.llama(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=64, tie_embeddings=True)
    config = TrainConfig(
        updates=updates, optimizer_args={"lr": 3e-3}, warmup=20, evaluate_every=100, evaluate_batches=9
    )
    result = Trainer(shape, config, folder / "out").fit(train, validation)
    print(f"{result.records[0].loss:.2f} -> {result.records[-1].validation_loss:.2f} nats per byte")

    tokens = load_tokenizer("bytes")
    return tokens.decode([*generate(result.for_inference(), tokens.encode("def "), tokens=60, seed=1)])


if __name__ == "__main__":
    print(main(Path("out/example")))
