"""Train a decoder of x-transformers in a plain loop, with its AutoregressiveWrapper, as its examples do."""

import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

VOCAB, LENGTH, MICROBATCHES = 79, 24, 4

torch.manual_seed(11)
model = AutoregressiveWrapper(
    TransformerWrapper(
        num_tokens=VOCAB,
        max_seq_len=LENGTH,
        attn_layers=Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, rotary_pos_emb=True, ff_dropout=0.1),
    )
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)


def batches():
    while True:
        steps = torch.randint(1, 6, (4, LENGTH + 1)).cumsum(1)
        yield (steps + torch.randint(VOCAB, (4, 1))) % VOCAB


train, validation = batches(), batches()
for step in range(8):
    model.train()
    total = 0.0
    for _ in range(MICROBATCHES):
        loss = model(next(train))
        (loss / MICROBATCHES).backward()
        total += loss.item() / MICROBATCHES
    print(f"training loss: {total:.5f}")
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    if step % 4 == 0:
        model.eval()
        with torch.no_grad():
            print(f"validation loss: {model(next(validation)).item():.5f}")
