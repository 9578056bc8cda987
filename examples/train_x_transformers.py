"""Ten lines train a module from another library: a decoder of x-transformers, with its ScaleNorm and memory tokens.

Norm gains and memory tokens get no weight decay, the module stays as its library built it, and a checkpoint resumes.
"""

from pathlib import Path

from torch import nn

from reference import FitResult, TokenData, TrainConfig, Trainer
from reference.data.prepare import prepare


def build() -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=64, depth=2, heads=2, use_scalenorm=True, rotary_pos_emb=True)
    return TransformerWrapper(num_tokens=257, max_seq_len=64, attn_layers=layers, num_memory_tokens=4)


def main(folder: Path, updates: int = 200) -> FitResult:
    prepare([], "bytes", folder / "data", progress=False)
    data = TokenData(folder / "data", "train", block_size=64, microbatch_size=16, seed=1)
    config = TrainConfig(updates=updates, optimizer_args={"lr": 3e-3, "weight_decay": 0.1}, save_every=100)
    return Trainer(build, config, folder / "out").fit(data, resume="auto")


if __name__ == "__main__":
    result = main(Path("out/x-transformers"))
    print(f"{result.records[0].loss:.2f} -> {result.records[-1].loss:.2f} nats per byte")
