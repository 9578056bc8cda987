"""Faults of a resume: the first run leaves ckpt.pt, and the second one, which is audited, goes on from it."""

from functools import partial

from tests.audits.faults import Fault as One

Fault = partial(One, script="resumable", before=("--steps", "3"), arguments=("--resume", "ckpt.pt"))

FAULTS = [
    Fault(
        title="the optimizer's state is not loaded",
        old='        optimizer.load_state_dict(state["optimizer"])\n',
        new="",
        source="OneVision-Encoder#65",
        words=r"optimizer|moment|state",
    ),
    Fault(
        title="the optimizer's state is not saved",
        old='"optimizer": optimizer.state_dict(), ',
        new="",
        source="DeepSpeed#7786",
        words=r"optimizer|moment|state",
        also=(('        optimizer.load_state_dict(state["optimizer"])\n', ""),),
    ),
    Fault(
        title="the initialisation runs after the load",
        old='        optimizer.load_state_dict(state["optimizer"])\n',
        new='        optimizer.load_state_dict(state["optimizer"])\n        model.apply(init)\n',
        source="huggingface/transformers#46620",
        words=r"load|checkpoint|overw",
    ),
    Fault(
        title="the schedule starts again",
        old='        scheduler.load_state_dict(state["scheduler"])\n',
        new="        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 4) * 0.9**n, last_epoch=-1)\n",
        source="EvolvingLMMs-Lab/OneVision-Encoder#65",
        words=r"schedul|rate|lr",
    ),
    Fault(
        title="the data starts again",
        both_watched=True,
        old='        data.position, start = state["position"], state["step"]\n',
        new='        start = state["step"]\n',
        source="KempnerForge#51",
        words=r"data|same|again|row|rewind",
    ),
    Fault(
        title="the generator is not restored",
        old='        torch.set_rng_state(state["rng"])\n',
        new="",
        source="transformers#17032",
        words=r"generator|rng|dropout",
    ),
    Fault(
        title="a missing checkpoint starts afresh",
        old="    if args.resume:\n",
        new="    if args.resume and args.resume.exists():\n",
        source="pytorch/torchtitan#1311",
        words=r"missing|exist|afresh|began without",
        before=(),
        arguments=("--resume", "nowhere.pt"),
    ),
    Fault(
        title="strict=False loads nothing, as names have a prefix",
        old='        model.load_state_dict(state["model"])\n',
        new='        model.load_state_dict({"_orig_mod." + k: v for k, v in state["model"].items()}, strict=False)\n',
        source="rasbt/LLMs-from-scratch#580",
        words=r"load|prefix|strict|checkpoint",
    ),
    Fault(
        title="assign=True unties the head",
        old='        model.load_state_dict(state["model"])\n',
        new='        model.load_state_dict({k: v.clone() for k, v in state["model"].items()}, assign=True)\n',
        source="verl#7834",
        words=r"tie|tied|optimizer|group",
    ),
    Fault(
        title="weights are rounded to 16 bits in the checkpoint",
        old='state = {"model": model.state_dict()',
        new='state = {"model": {k: v.bfloat16() for k, v in model.state_dict().items()}',
        source="huggingface/nanotron#245",
        words=r"16.bit|bf16|bfloat16|round",
    ),
    Fault(
        title="the optimizer is made anew after the load",
        old="    model.train()\n    for step",
        new="    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3) if args.resume else optimizer\n    model.train()\n    for step",
        source="DeepSpeed#7786",
        words=r"optimizer|moment|state",
    ),
    Fault(
        title="only the model is saved",
        old='        optimizer.load_state_dict(state["optimizer"])\n        scheduler.load_state_dict(state["scheduler"])\n        torch.set_rng_state(state["rng"])\n        data.position, start = state["position"], state["step"]\n',
        new='        start = state["step"]\n',
        source="DeepSpeed#7786",
        words=r"optimizer|moment|state",
        also=(
            ('"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}', "}"),
            (
                '            state |= {"rng": torch.get_rng_state(), "position": data.position, "step": step + 1}\n',
                '            state |= {"step": step + 1}\n',
            ),
        ),
    ),
]
