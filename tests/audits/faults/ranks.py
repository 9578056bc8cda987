"""Faults that need two ranks."""

from functools import partial

from tests.audits.faults import Fault as One

Fault = partial(One, ranks=2)

FAULTS = [
    Fault("ddp_by_hand", "the forward bypasses the wrapper", "logits = model(batch[:, :-1])", "logits = model.module(batch[:, :-1])", "jingyaogong/minimind#853", r"reduc|rank"),
    Fault("ddp_by_hand", "the flag is set between forward and backward",
          "            with contextlib.nullcontext() if last else model.no_sync():\n                logits = model(batch[:, :-1])\n                loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())\n                (loss / ACCUMULATE).backward()",
          "            logits = model(batch[:, :-1])\n            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())\n            model.require_backward_grad_sync = last\n            (loss / ACCUMULATE).backward()",
          "karpathy/build-nanogpt#30", r"reduc|rank"),
    Fault("ddp_by_hand", "never synchronises", "contextlib.nullcontext() if last else model.no_sync()", "model.no_sync()", "litgpt 9892d1b8", r"reduc|rank"),
    Fault("ddp_by_hand", "each rank reads the same rows", "num_replicas=world, rank=rank", "num_replicas=world, rank=0", "jzhang38/TinyLlama#67", r"same|rank"),
    Fault("ddp_by_hand", "no sampler, and the same shuffle on each rank", "batch_size=BATCH, sampler=sampler, drop_last=True)", "batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(3))", "jzhang38/TinyLlama#69", r"same|rank"),
    Fault("ddp_by_hand", "equal dropout on all ranks", "torch.manual_seed(100 + rank)", "torch.manual_seed(100)", "mlcommons/training#844", r"dropout|mask|generator"),
    Fault("ddp_by_hand", "reduces by hand, from other weights on each rank", "    model = DDP(model)\n", "    for p in model.parameters():\n        p.register_post_accumulate_grad_hook(lambda q: None)\n    model.no_sync = contextlib.nullcontext\n",
          "litgpt#269", r"rank|weights|differ|initial",
          also=(("torch.manual_seed(7)\n", "torch.manual_seed(7 + rank)\n"), ("            nn.utils.clip_grad_norm_", "            for p in model.parameters():\n                dist.all_reduce(p.grad)\n                p.grad /= world\n            nn.utils.clip_grad_norm_"))),
    Fault("ddp_by_hand", "gradients are summed over ranks", "    model = DDP(model)\n", "    model.no_sync = contextlib.nullcontext\n", "field notes 2", r"world|sum|rank|times|weigh",
          also=(("            nn.utils.clip_grad_norm_", "            for p in model.parameters():\n                dist.all_reduce(p.grad)\n            nn.utils.clip_grad_norm_"),)),
    Fault("ddp_by_hand", "clips on one rank only", "            nn.utils.clip_grad_norm_(model.parameters(), 0.5)\n", "            if rank == 0:\n                nn.utils.clip_grad_norm_(model.parameters(), 0.5)\n", "DeepSpeed#1801", r"rank|clip|replica"),
    Fault("ddp_by_hand", "clips before the reduction", "    model = DDP(model)\n", "    model.no_sync = contextlib.nullcontext\n", "pytorch#72548", r"clip|rank|reduc",
          also=(("            optimizer.step()\n", "            for p in model.parameters():\n                dist.all_reduce(p.grad)\n                p.grad /= world\n            optimizer.step()\n"),)),
    Fault("ddp_by_hand", "the weights are converted after wrapping", "    torch.manual_seed(100 + rank)  #", "    for m in model.modules():\n        for n, p in list(m.named_parameters(recurse=False)):\n            setattr(m, n, nn.Parameter(p.detach().clone()))\n    torch.manual_seed(100 + rank)  #", "pytorch#104336", r"reduc|rank"),
    Fault("ddp_by_hand", "one rank is in evaluation mode", "    step, micro, total = 0, 0, 0.0\n", "    model.train(rank == 0)\n    step, micro, total = 0, 0, 0.0\n", "LitGPT HEAD, finding 4", r"eval"),
    Fault("ddp_by_hand", "another rate on each rank", "schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 3))", "schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1 + rank) / 3))", "axolotl#1566", r"rank|rate|replica"),
    Fault("ddp_by_hand", "the loss of rank 0 is printed", "            dist.all_reduce(mean)\n", "            mean *= world\n", "Lightning-AI/litgpt#1971", r"print|report"),
    Fault("ddp_by_hand", "each rank's token mean counts the same", "logits = model(batch[:, :-1])", "logits = model(batch[:, :-1])\n                batch = batch.clone()\n                batch[:, 3 + 6 * rank :] = -100", "huggingface/transformers#34242", r"equal|weigh|mean|rank"),
    Fault("ddp_by_hand", "the schedule steps at every microbatch", "            total, micro = total + loss.item() / ACCUMULATE, micro + 1\n", "            total, micro = total + loss.item() / ACCUMULATE, micro + 1\n            schedule.step()\n", "starVLA#210", r"schedul|rate"),
    Fault("fsdp2_by_hand", "each rank reads the same rows", "mine = ids[rank::world]", "mine = ids[:rows]", "jzhang38/TinyLlama#67", r"same|rank"),
    Fault("fsdp2_by_hand", "the last microbatch is not reduced", "model.set_requires_gradient_sync(micro == args.accumulate - 1)", "model.set_requires_gradient_sync(micro == 0)", "karpathy/build-nanogpt#30", r"reduc|rank|microbatch|left|clip|gradient"),
    Fault("fsdp2_by_hand", "clips its shards by their own norm", "nn.utils.clip_grad_norm_(model.parameters(), args.clip)", "local = [p.to_local().detach().requires_grad_() for p in model.parameters()]\n        for q, p in zip(local, model.parameters()):\n            q.grad = p.grad.to_local()\n        nn.utils.clip_grad_norm_(local, args.clip)", "pytorch#72548", r"clip|rank"),
    Fault("fsdp2_by_hand", "the optimizer was built before sharding", "    for layer in model.layers:\n        fully_shard(layer, mesh=mesh)\n", "    early = list(model.parameters())\n    for layer in model.layers:\n        fully_shard(layer, mesh=mesh)\n", "pytorch#149205", r"optimizer|group",
          also=(("for p in model.parameters() if p.ndim >= 2]", "for p in early if p.ndim >= 2]"), ("for p in model.parameters() if p.ndim < 2]", "for p in early if p.ndim < 2]"))),
    Fault("fsdp2_by_hand", "is not causal", "(q, k, v, is_causal=True)", "(q, k, v)", "huggingface/transformers#48745", r"later|future|causal|not looked"),
    Fault("fsdp2_by_hand", "accumulation is not divided", "F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / args.accumulate", "F.cross_entropy(model(x).flatten(0, 1), y.flatten())", "karpathy/nanoGPT#168", r"microbatch|accumul|scaled|times", also=(("            seen += loss.detach()", "            seen += loss.detach() / args.accumulate"),)),
    Fault("fsdp2_by_hand", "gradients are never cleared", "        optimizer.zero_grad()\n", "", "folklore", r"left|clear|accumul|before"),
]
