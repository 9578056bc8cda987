"""LitGPT: fine-tuning on quantised weights never trains the StableEmbedding that it swaps in, and loses its norm.

litgpt.finetune.lora.setup runs as it is, on a tiny random checkpoint that LitGPT itself makes. Fabric's
BitsandbytesPrecision wants CUDA; without it, this script keeps the plugin (by which the function decides to swap), but
lets it leave the layers as they are, and takes the optimizer that is not paged. The lines about the swap are LitGPT's.
"""

import contextlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes
import torch
import yaml
from lightning.fabric import connector
from lightning.fabric.plugins import BitsandbytesPrecision
from litgpt import GPT, Config
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune import lora
from litgpt.prompts import Default
from litgpt.utils import save_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn import functional as F
from torch.utils.data import DataLoader

warnings.filterwarnings("ignore")
ROWS = torch.randint(128, (8, 17), generator=torch.Generator().manual_seed(0))


class Rows(DataModule):
    """Eight sequences, over and over."""

    prompt_style = Default()

    def connect(self, **ignored: Any) -> None:
        """Nothing is needed."""

    def train_dataloader(self) -> Any:
        count = {"raw": 17, "raw_plus_prompt_template": 17}
        samples: Any = [{"input_ids": row, "labels": row, "token_counts": count} for row in ROWS]
        return DataLoader(samples, batch_size=4, collate_fn=get_sft_collate_fn())

    val_dataloader = train_dataloader


def loss(model: Any) -> float:
    """Cross entropy of the eight sequences."""
    with torch.no_grad():
        return float(
            F.cross_entropy(
                model(ROWS[:, :-1].to(next(model.parameters()).device)).flatten(0, 1).cpu().float(),
                ROWS[:, 1:].flatten(),
            )
        )


folder = Path(tempfile.mkdtemp())
config = Config.from_name(
    "pythia-14m",
    n_layer=1,
    n_head=2,
    n_embd=64,
    head_size=None,
    intermediate_size=192,
    block_size=17,
    padded_vocab_size=128,
    vocab_size=128,
    n_query_groups=None,
)
torch.manual_seed(1)
base = GPT(config)
torch.nn.init.normal_(base.transformer.wte.weight, std=(2 / 5 / 64) ** 0.5)  # as litgpt.pretrain draws it
optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
for _ in range(12):  # so that the weights know something
    F.cross_entropy(base(ROWS[:, :-1]).flatten(0, 1), ROWS[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
torch.save(base.state_dict(), folder / "lit_model.pth")
save_config(config, folder)
Tokenizer(WordLevel({f"<{n}>": n for n in range(128)}, unk_token="<0>")).save(str(folder / "tokenizer.json"))
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))

seen: dict[str, Any] = {}
original = lora.fit


def fit(**arguments: Any) -> Any:
    """lora.fit, with a look before and after."""
    model, optimizer = arguments["model"], arguments["optimizer"]
    owned = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    named = dict(model.named_parameters())
    orphans = owned - {id(tensor) for tensor in named.values()}
    seen["trainable, in no group"] = [n for n, p in named.items() if p.requires_grad and id(p) not in owned]
    seen["frozen, in a group"] = sum(not p.requires_grad and id(p) in owned for p in named.values())
    seen["in a group, not in the model"] = len(orphans)
    before = {name: named[name].detach().clone() for name in seen["trainable, in no group"]}
    seen["first loss"] = loss(model)
    result = original(**arguments)
    seen["of them moved"] = [n for n, tensor in before.items() if not torch.equal(tensor, named[n])]
    model.eval()
    seen["last loss"] = loss(model)
    return result


with contextlib.ExitStack() as stack:
    if not torch.cuda.is_available():
        ask, asked = connector._Connector._check_and_init_precision, lambda self: self._precision_instance or ask(self)
        stack.enter_context(patch.object(connector._Connector, "_check_and_init_precision", asked))
        stack.enter_context(patch.object(BitsandbytesPrecision, "convert_module", lambda _, module: module))
        stack.enter_context(
            patch.object(BitsandbytesPrecision, "module_init_context", lambda _: contextlib.nullcontext())
        )
        stack.enter_context(patch.object(bitsandbytes.optim, "PagedAdamW", bitsandbytes.optim.AdamW))
    stack.enter_context(patch.object(lora, "fit", fit))
    stack.enter_context(contextlib.redirect_stdout(sys.stderr))
    train = TrainArgs(save_interval=None, micro_batch_size=4, global_batch_size=4, epochs=100, max_steps=4)
    train.lr_warmup_steps = 1
    stack.enter_context(patch.object(sys, "argv", ["litgpt", "finetune_lora", str(folder)]))
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}}
    options = {"precision": "32-true", "quantize": "bnb.nf4", "train": train, "optimizer": adamw, "seed": 1}
    lora.setup(
        folder, folder / "out", data=Rows(), eval=EvalArgs(10**9, max_new_tokens=1, final_validation=False), **options
    )

saved = torch.load(folder / "out/final/lit_model.pth.lora", weights_only=True)["model"]
served = GPT(Config(**yaml.safe_load((folder / "out/final/model_config.yaml").read_text())))
served.load_state_dict(torch.load(folder / "out/final/lit_model.pth", weights_only=True))
kind = "CUDA, quantised" if torch.cuda.is_available() else "the CPU, not quantised"
left = [name.removeprefix("_forward_module.transformer.") for name in seen["trainable, in no group"]]
print(f"on {kind}")
print(f"trainable, in no group: {', '.join(left)}; moved in 4 updates: {seen['of them moved'] or 'none'}")
print(f"frozen, in a group: {seen['frozen, in a group']} tensors")
print(f"in a group, but not in the model: {seen['in a group, not in the model']} tensor")
print(f"loss of the checkpoint {loss(base):.3f}, first loss of the run {seen['first loss']:.3f}")
print(
    f"loss of the trained model {seen['last loss']:.3f}, of the merged model that is served {loss(served.eval()):.3f}"
)
print(f"saved of the embedding and its norm: {[name for name in saved if 'wte' in name] or 'nothing'}")
