"""DeepSpeed: a checkpoint of ZeRO-1 cannot be loaded by another number of processes."""

import tempfile

import torch
from deepspeed_run import engine_of, loss_of, run

ids = torch.randint(16, (4, 16), generator=torch.Generator().manual_seed(2))


def save(rank, folder):
    engine = engine_of()
    engine.backward(loss_of(engine, ids, ids))
    engine.step()
    engine.save_checkpoint(folder)


def load(rank, folder):
    engine = engine_of()
    try:
        engine.load_checkpoint(folder)
        said = "loaded"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    if rank == 0:
        print(f"  {said}", flush=True)


if __name__ == "__main__":
    for saved, loaded in ((1, 1), (2, 2), (2, 1), (1, 2)):
        with tempfile.TemporaryDirectory() as folder:
            print(f"saved by {saved} processes, loaded by {loaded}:", flush=True)
            run(save, folder, world=saved)
            run(load, folder, world=loaded)
