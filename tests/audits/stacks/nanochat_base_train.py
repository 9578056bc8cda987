"""Run base_train of a checkout of nanochat, which the environment variable NANOCHAT names, on a synthetic corpus."""

import os
import pickle
import random
import runpy
import sys
from pathlib import Path

import pyarrow
import tiktoken
import torch
from pyarrow import parquet

FOLDER, CHECKOUT = Path("base").resolve(), os.environ["NANOCHAT"]

for name in ("tokenizer", "base_data_climbmix"):
    (FOLDER / name).mkdir(parents=True)
encoding = tiktoken.Encoding(
    "bytes", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={"<|bos|>": 256}
)
(FOLDER / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
torch.save(torch.ones(257, dtype=torch.int64), FOLDER / "tokenizer" / "token_bytes.pt")
words = "the a of some every no tree house river sees finds leaves old new green".split()
random.seed(1)
for name in ("shard_0", "shard_1"):  # the last is for validation
    table = pyarrow.table({"text": [" ".join(random.choices(words, k=30)) + "." for _ in range(4096)]})
    parquet.write_table(table, FOLDER / "base_data_climbmix" / f"{name}.parquet", row_group_size=1024)
os.environ["NANOCHAT_BASE_DIR"] = str(FOLDER)
torch.compiler.set_stance("force_eager")  # base_train compiles always, which takes minutes
sys.path.insert(0, CHECKOUT)
sys.argv = """base_train --device-type=cpu --depth=2 --aspect-ratio=16 --head-dim=16 --max-seq-len=64 --device-batch-size=2
    --total-batch-size=512 --num-iterations=8 --warmup-steps=2 --eval-every=4 --eval-tokens=512 --core-metric-every=-1
    --sample-every=-1 --model-tag=run""".split()
os.chdir(CHECKOUT)
runpy.run_module("scripts.base_train", run_name="__main__")
