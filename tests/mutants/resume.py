"""Faults of saving and of going on from a checkpoint."""

from tests.mutants.planting import FIT, LOAD, PUT, RATE, RESTORE, UPDATE, mutant

BATCHES, SAVE = "reference.training.run:Run.batches", "reference.training.saving:save"
START = "start = done * self.config.microbatches"
STREAM = "train.batches_from(start, self.fabric.global_rank, self.fabric.world_size)"
WRAPPED = (SAVE, "weights: Any = run.module\n", "weights: Any = run.wrapped._forward_module\n")
STATE, LOAD_STATE = "reference.optimizers.state:state_of_one", "reference.optimizers.state:load_into_one"
PUT_INTO, OWN = "reference.checkpoint.folder:put_into", "own = model.state_dict()"
LOOSE = f"{OWN}; saved = own | {{name: saved[name] for name in own if name in saved}}"

MUTANTS = [
    mutant(
        "rng-not-restored",
        "RESUME-1",
        "transformers#17032, nanoGPT#467",
        (UPDATE, "seed_dropout(derive_seed(config.seed, update, fabric.global_rank), device)", "pass"),
    ),
    mutant(
        "scheduler-not-restored",
        "RESUME-1",
        "transformers, accelerate: scheduler.pt left out; the first loss is equal",
        (UPDATE, RATE, RATE.replace("update", "update - self.__dict__.setdefault('first', update)")),
    ),
    mutant("data-rewinds", "RESUME-1 RESUME-2", "KempnerForge#51, entrenar#294", (BATCHES, START, "start = 0")),
    mutant(
        "data-cursor-in-updates",
        "RESUME-1",
        "litgpt#926 (iterations and steps mixed)",
        (BATCHES, START, "start = done"),
    ),
    mutant(
        "data-cursor-sticks",
        "RESUME-2",
        "litgpt#1712, OLMo#650",
        (
            BATCHES,
            STREAM,
            f"{STREAM} if not start else itertools.cycle(list(itertools.islice({STREAM}, "
            "-start % (train.sequences // train.microbatch_size) or train.sequences // train.microbatch_size)))",
        ),
    ),
    mutant(
        "epoch-boundary-zero-steps",
        "RESUME-2",
        "verl#7401, #5725",
        (
            FIT,
            "for update in range(done, config.updates):",
            "for update in range(done, config.updates if done % (getattr(train, 'sequences', 1) // 2 or 9) or not done "
            "else done):",
        ),
    ),
    mutant(
        "final-not-saved",
        "RESUME-3",
        "litgpt#1254, nanoGPT",
        (FIT, "is_due(update, config.save_every, last)", "is_due(update, config.save_every, False)"),
    ),
    mutant("ckpt-wrapper-prefix", "RESUME-4", "pytorch#101107, LLMs-from-scratch#580", WRAPPED),
    mutant(
        "ckpt-loose-load",
        "RESUME-4",
        "load_state_dict(strict=False) over a prefix",
        WRAPPED,
        (
            "reference.checkpoint.folder:put_into",
            "own = model.state_dict()",
            "own = model.state_dict(); saved = own | {name: saved[name] for name in own if name in saved}",
        ),
    ),
    mutant(
        "ckpt-damage-overlooked",
        "RESUME-5",
        "pytorch-lightning#688, #19970",
        (LOAD, PUT, f"with __import__('contextlib').suppress(CheckpointError): {PUT}"),
    ),
    mutant(
        "saving-rounds-the-weights",
        "RESUME-6",
        "diffusers#1864 (what was put in place for the file stays)",
        (SAVE, "weights: Any = run.module\n", "weights: Any = run.module.bfloat16().float()\n"),
    ),
    mutant(
        "saving-halves-the-state",
        "RESUME-6",
        "state_dict() shares its tensors with the optimizer",
        (
            STATE,
            "state = optimizer.state_dict()",
            "state = optimizer.state_dict(); [v.copy_(v.bfloat16()) for s in state['state'].values() "
            "for v in s.values() if hasattr(v, 'ndim') and v.ndim and v.is_floating_point()]",
        ),
    ),
    mutant(
        "saved-decay-wins",
        "RESUME-7",
        "Optimizer.load_state_dict",
        (RESTORE, "group[key] = value", "pass"),
    ),
    mutant(
        "saved-rate-wins",
        "RESUME-7",
        "Optimizer.load_state_dict",
        (
            RESTORE,
            "run.fabric.strategy.precision.load_state_dict",
            "run.peaks[:] = [group['lr'] for group in saved['param_groups']]; "
            "run.fabric.strategy.precision.load_state_dict",
        ),
    ),
    mutant(
        "frozen-not-saved",
        "RESUME-8",
        "DeepSpeed#6771, #5489",
        (
            SAVE,
            "weights: Any = run.module\n",
            "weights: Any = {n: p for n, p in run.module.named_parameters() if p.requires_grad}\n",
        ),
        (PUT_INTO, OWN, LOOSE),
    ),
    mutant(
        "frozen-not-loaded",
        "RESUME-8",
        "litgpt save_lora_checkpoint",
        (PUT_INTO, OWN, "own = model.state_dict(); saved = saved | {n: t for n, t in own.items() if 'frozen' in n}"),
    ),
    mutant(
        "cursor-forgets-what-was-left-over",
        "RESUME-9",
        "litgpt#1712 (batches in an epoch, floored)",
        (
            "reference.data.tokens:TokenData.microbatches",
            "rank) * size + np.arange(size)",
            "rank) * size + np.arange(size) + "
            "start * size // (self.sequences // size * size) * (self.sequences % size)",
        ),
    ),
    mutant(
        "resumes-in-the-order-of-the-first-epoch",
        "RESUME-9 RESUME-2",
        "set_epoch not called after a resume",
        (BATCHES, START, "start = done * self.config.microbatches; start %= getattr(train, 'sequences', 10**9) // 2"),
    ),
    mutant(
        "16-bit-state-saved-in-8-bits",
        "RESUME-10",
        "OpenTau#185 (another dtype in the file)",
        (
            STATE,
            "state = optimizer.state_dict()",
            "state = optimizer.state_dict(); f8 = __import__('torch').float8_e5m2; state['state'] = {i: {k: "
            "v.to(f8).to(v.dtype) if getattr(v, 'ndim', 0) and v.element_size() == 2 else v for k, v in s.items()} "
            "for i, s in state['state'].items()}",
        ),
    ),
    mutant(
        "16-bit-state-rounded-on-load",
        "RESUME-10",
        "nanotron#245",
        (
            LOAD_STATE,
            'keep_own_dtypes(optimizer, state["state"], state.get("dtypes", []))',
            "keep_own_dtypes(optimizer, state['state']); [v.mul_(1.01) for p in all_parameters(optimizer) "
            "if p.element_size() == 2 for k, v in tensors_of(optimizer.state[p]) if v.ndim]",
        ),
    ),
    mutant(
        "only-moments-of-adam-saved",
        "RESUME-11",
        "OneVision-Encoder#65",
        (
            STATE,
            "state = optimizer.state_dict()",
            "state = optimizer.state_dict(); state['state'] = {i: {k: v for k, v in s.items() "
            "if k != 'momentum_buffer'} for i, s in state['state'].items()}",
        ),
    ),
    mutant(
        "second-optimizer-starts-afresh",
        "RESUME-12",
        "a checkpoint that holds the state of one optimizer of two",
        (
            "reference.optimizers.state:load_optimizer_state",
            "load_into_one(member, part)",
            "member is not own[0] or load_into_one(member, part)",
        ),
    ),
    mutant(
        "scalars-rounded-on-load",
        "RESUME-11",
        "torch's load_state_dict: NAdam's mu_product under bf16-true",
        (LOAD_STATE, 'keep_own_dtypes(optimizer, state["state"], state.get("dtypes", []))', "pass"),
    ),
    mutant(
        "second-resume-counts-updates-anew",
        "RESUME-13",
        "pytorch/torchtitan#571: wrong step when resuming for the second time",
        (
            "reference.training.trainer:Trainer.fit",
            "save(run, update + 1, train)",
            "save(run, update + 1 - done, train)",
        ),
    ),
    mutant(
        "newest-checkpoint-removed",
        "RESUME-14",
        "huggingface/transformers#11769, #27138",
        ("reference.checkpoint.folder:prune", "found[:-keep_last]", "found[keep_last:]"),
    ),
    mutant(
        "last-checkpoint-whatever-was-chosen",
        "RESUME-2",
        "allenai/open-instruct#1823, radixark/miles#2688: another checkpoint than the one that was chosen",
        (
            "reference.checkpoint.folder:find",
            "folder = Path(resume)\n",
            "folder = Path(resume)\n    folder = [folder, *checkpoints(folder.parent)][-1]\n",
        ),
    ),
    mutant(
        "newest-by-its-digits",
        "RESUME-14",
        "allenai/open-instruct#541, Lightning-AI/litgpt#661: 9 is taken for later than 10",
        (
            "reference.checkpoint.folder:checkpoints",
            "sorted(found, key=number)",
            "sorted(found, key=lambda path: str(number(path)))",
        ),
    ),
    mutant(
        "newest-found-by-its-digits",
        "RESUME-15",
        "allenai/open-instruct#541, Lightning-AI/litgpt#661: 9 is taken for later than 10",
        (
            "reference.checkpoint.folder:find",
            "return found[-1]",
            "return max(found, key=lambda path: path.name.lstrip('step-0'))",
        ),
    ),
]
