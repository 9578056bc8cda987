"""Run train.py of a checkout of nanoGPT, which the environment variable NANOGPT names, on a synthetic corpus."""

import os
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np

VOCAB, FOLDER, CHECKOUT = 65, Path("data").resolve(), os.environ["NANOGPT"]

FOLDER.mkdir()
draw = np.random.default_rng(1)
for split in ("train", "val"):
    (draw.integers(1, 6, 20_000).cumsum() % VOCAB).astype(np.uint16).tofile(FOLDER / f"{split}.bin")
(FOLDER / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": VOCAB}))
sys.path.insert(0, CHECKOUT)
sys.argv = f"""train.py --dataset={FOLDER} --out_dir={FOLDER} --device=cpu --compile=False --dtype=float32 --log_interval=1
    --eval_iters=4 --eval_interval=4 --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --max_iters=8
    --gradient_accumulation_steps=4 --warmup_iters=2 --lr_decay_iters=8 --dropout=0.1""".split()
os.chdir(CHECKOUT)
runpy.run_path("train.py", run_name="__main__")
