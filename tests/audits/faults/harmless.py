"""Changes of the honest scripts that leave them honest: what the audit must not accuse.

``words`` fits the rules whose advice is true of them.
"""

from tests.audits.faults import Fault

HARMLESS = [
    Fault(
        "nanogpt_like",
        "gradients are set to zero and kept",
        "zero_grad(set_to_none=True)",
        "zero_grad(set_to_none=False)",
        "",
        "",
    ),
    Fault("nanogpt_like", "no dropout", "dropout = 97, 2, 2, 32, 0.1", "dropout = 97, 2, 2, 32, 0.0", "", ""),
    Fault(
        "nanogpt_like",
        "SGD with Nesterov's momentum",
        "torch.optim.AdamW(optim_groups, lr=learning_rate, betas=(beta1, beta2))",
        "torch.optim.SGD(optim_groups, lr=learning_rate, momentum=0.9, nesterov=True)",
        "",
        "",
    ),
    Fault(
        "nanogpt_like",
        "an average of the weights, and a teacher with loaded ones",
        'X, Y = get_batch("train")\niter_num = 0',
        'import copy\nema = copy.deepcopy(model)\nteacher = GPT(); teacher.load_state_dict(model.state_dict()); teacher.eval()\nX, Y = get_batch("train")\niter_num = 0',
        "",
        "",
        also=(
            (
                "    iter_num += 1\n",
                "    iter_num += 1\n    with torch.no_grad():\n        for a, b in zip(ema.parameters(), model.parameters()):\n            a.lerp_(b, 0.1)\n        teacher(X)\n",
            ),
        ),
    ),
    Fault(
        "masked_sft",
        "label smoothing",
        'reduction="sum") / count',
        'reduction="sum", label_smoothing=0.1) / count',
        "",
        "",
    ),
    Fault(
        "masked_sft",
        "a z-loss",
        "        loss.backward()\n",
        "        loss = loss + 1e-4 * logits.logsumexp(-1).square().sum() / count\n        loss.backward()\n",
        "",
        "",
    ),
    Fault(
        "ddp_by_hand",
        "gradients are averaged by hand",
        "    model = DDP(model)\n",
        "    model.no_sync = contextlib.nullcontext\n",
        "",
        "",
        also=(
            (
                "            nn.utils.clip_grad_norm_",
                "            for p in model.parameters():\n                dist.all_reduce(p.grad)\n                p.grad /= world\n            nn.utils.clip_grad_norm_",
            ),
        ),
        ranks=2,
    ),
    Fault(
        "ddp_by_hand",
        "nothing is clipped",
        "            nn.utils.clip_grad_norm_(model.parameters(), 0.5)\n",
        "",
        "",
        "",
        ranks=2,
    ),
    Fault(
        "fp16_scaler",
        "the first steps overflow and are skipped",
        "init_scale=1024.0, growth_interval=2",
        "init_scale=2.0**40, growth_interval=2",
        "",
        "",
    ),
    Fault(
        "resumable",
        "fine-tuning from the weights of a training checkpoint",
        '        optimizer.load_state_dict(state["optimizer"])\n        scheduler.load_state_dict(state["scheduler"])\n        torch.set_rng_state(state["rng"])\n        data.position, start = state["position"], state["step"]\n',
        "        model.norm.weight.data.fill_(1.0)\n",
        "",
        "resume-weights|resume-optimizer",
        also=(('--resume", type', '--init-weights", dest="resume", type'),),
        before=("--steps", "3"),
        arguments=("--init-weights", "ckpt.pt"),
        broken_before=False,
    ),
    Fault(
        "schedule_free",
        "the loss of a training batch is evaluated, too",
        'print(f"validation {loss_of(model, held_out).item():.4f}")',
        'print(f"validation {loss_of(model, held_out).item():.4f} {loss_of(model, rows(4, torch.Generator().manual_seed(9))):.3f}")',
        "",
        "",
    ),
    Fault(
        "lbfgs",
        "full-batch Rprop",
        "torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, history_size=5)",
        "torch.optim.Rprop(model.parameters())",
        "",
        "",
    ),
    Fault(
        "in_backward",
        "SGD in backward",
        "torch.optim.AdamW([p], lr=1e-3, weight_decay=0.1 if p.ndim > 1 else 0.0)",
        "torch.optim.SGD([p], lr=1e-1)",
        "",
        "",
    ),
    Fault("compiled", "the eager backend", 'backend="aot_eager")', 'backend="eager")', "", ""),
    Fault(
        "accelerate_args",
        "bf16 autocast by accelerate",
        "Accelerator(cpu=True,",
        "Accelerator(cpu=True, mixed_precision='bf16',",
        "",
        "",
    ),
    Fault(
        "lightning_trainer",
        "bf16 autocast by Lightning",
        'accelerator="cpu",',
        'accelerator="cpu", precision="bf16-mixed",',
        "",
        "",
    ),
    Fault(
        "hf_trainer",
        "Adafactor, activation checkpointing and evaluation",
        "logging_steps=1,",
        "logging_steps=1, eval_strategy='steps', eval_steps=2, optim='adafactor', gradient_checkpointing=True,",
        "",
        "first-rate-0|first-counted",  # both are true of transformers: reports/findings/transformers.md
    ),
]
