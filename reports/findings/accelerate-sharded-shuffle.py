"""accelerate: with a seed for each rank and the seedable sampler, ranks shuffle apart: samples come twice, or never.

Prints, for an epoch of eight samples on two ranks, who sees which.
"""

import os

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.utils.data import DataLoader


def train(rank, device_specific, data_seed, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=data_seed)
    accelerator = Accelerator(cpu=True, dataloader_config=options)
    set_seed(1, device_specific=device_specific)
    loader = accelerator.prepare(DataLoader(range(8), shuffle=True))
    seen = accelerator.gather(torch.cat(list(loader))).tolist()
    if accelerator.is_main_process:
        never = sorted(set(range(8)) - set(seen))
        print(f"device_specific={device_specific}, data_seed={data_seed}: seen {seen}, never seen {never}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    for number, case in enumerate(((False, None), (True, None), (True, 1))):
        torch.multiprocessing.spawn(train, (*case, 29511 + number), nprocs=2)
