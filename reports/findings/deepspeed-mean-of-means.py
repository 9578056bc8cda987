"""DeepSpeed: accumulation and ranks average the means of microbatches, so that tokens do not weigh the same.

Eight sequences, one of them with one target and seven with sixteen: in one batch, in 4 microbatches, on 2 ranks.
Prints what one update of SGD with a rate of 1 adds to one bias: the gradient with the other sign.
"""

import torch
from deepspeed_run import engine_of, loss_of, run

ids = torch.randint(16, (8, 16), generator=torch.Generator().manual_seed(2))
labels = (ids + 1) % 16
labels[0, 1:] = -100


def train(rank, pieces, world):
    engine = engine_of(accumulate=pieces)
    before = engine.module[2].bias.detach().clone()
    rows = zip(ids.chunk(pieces * world)[rank::world], labels.chunk(pieces * world)[rank::world])
    for some, targets in rows:
        engine.backward(loss_of(engine, some, targets))
        engine.step()
    if rank == 0:
        moved = (engine.module[2].bias - before)[0].item()
        print(f"{pieces} microbatches on {world} ranks: the bias moves by {moved:+.6f}", flush=True)


if __name__ == "__main__":
    for pieces, world in ((1, 1), (4, 1), (1, 2)):
        run(train, pieces, world, world=world)
