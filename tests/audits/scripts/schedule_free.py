"""Schedule-free AdamW, with an evaluation every few steps."""

import schedulefree
import torch
from torch import nn

vocab, length = 41, 14


class GRULM(nn.Module):
    """Not a transformer: a recurrent language model is causal too."""

    def __init__(self, width=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.rnn = nn.GRU(width, width, num_layers=2, batch_first=True, dropout=0.1)
        self.decoder = nn.Linear(width, vocab)
        nn.init.normal_(self.embedding.weight, std=0.1)
        nn.init.normal_(self.decoder.weight, std=0.02)
        nn.init.zeros_(self.decoder.bias)
        for name, p in self.rnn.named_parameters():
            nn.init.orthogonal_(p) if p.ndim > 1 else nn.init.zeros_(p)

    def forward(self, ids):
        return self.decoder(self.rnn(self.embedding(ids))[0])


def rows(count, generator):
    start = torch.randint(vocab, (count, 1), generator=generator)
    return (start + torch.randint(1, 5, (count, length + 1), generator=generator).cumsum(1)) % vocab


def loss_of(model, ids):
    return nn.functional.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:])


def main():
    torch.manual_seed(19)
    model = GRULM()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=5e-3, warmup_steps=2)
    generator, held_out = torch.Generator().manual_seed(3), rows(8, torch.Generator().manual_seed(4))
    for step in range(7):
        model.train()
        optimizer.train()
        loss = loss_of(model, rows(6, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.4f}")
        if step % 2 == 1:
            model.eval()
            optimizer.eval()
            with torch.no_grad():
                print(f"validation {loss_of(model, held_out).item():.4f}")


if __name__ == "__main__":
    main()
