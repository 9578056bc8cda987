"""A small GPT and the loop that trains it, as in many tutorials. Run it: python examples/plain_loop.py"""

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class GPT(nn.Module):
    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        options: Any = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        blocks = (nn.TransformerEncoderLayer(width, heads, 4 * width, **options) for _ in range(layers))
        self.blocks, self.norm, self.head = nn.ModuleList(blocks), nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        x = self.tokens(ids) + self.positions(torch.arange(ids.size(1)))
        for block in self.blocks:
            x = block(x, nn.Transformer.generate_square_subsequent_mask(ids.size(1)), is_causal=True)
        return self.head(self.norm(x))

    def loss(self, rows: Tensor) -> Tensor:  # (B, T + 1): T tokens, and each one's next
        return nn.functional.cross_entropy(self(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def train(
    shape: dict[str, int], batches: Tensor, validation: Tensor, file: Path, seed: int, optimizer: Any, **settings: Any
) -> list[float]:
    torch.manual_seed(seed)
    model = GPT(**shape)
    optimizer = optimizer(model.parameters(), **settings)
    losses = []
    for step, batch in enumerate(batches):
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call] # torch's own
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step:3}: loss {losses[-1]:.3f}")
    model.eval()
    with torch.no_grad():
        print(f"validation: {model.loss(validation):.3f}")
    torch.save(model.state_dict(), file)
    return losses


def main(steps: int = 250, file: Path = Path("plain_loop.pt")) -> list[float]:
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.tensor(list(b"".join(source.read_bytes() for source in sources)))  # bytes are tokens enough
    rows = text[: (steps + 1) * 16 * 65].view(16, steps + 1, 65).transpose(0, 1)  # the 16 rows of a batch lie far apart
    shape = {"vocabulary": 256, "context": 64, "width": 64, "layers": 2, "heads": 4}
    return train(shape, rows[1:], rows[0], file, seed=1, optimizer=torch.optim.AdamW, lr=3e-3)


if __name__ == "__main__":
    main()
