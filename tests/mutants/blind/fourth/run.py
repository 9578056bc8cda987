"""Faults of a run: data, evaluation, reports, resume, several ranks."""

from tests.mutants.planting import BUILD_MODULE, EVALUATE, FIT, RESTORE, SETUP, UPDATE, Mutant, mutant

MICROBATCHES, PLACES = "reference.data.tokens:TokenData.microbatches", "reference.data.tokens:TokenData.places"
BATCHES, FETCH = "reference.training.run:Run.batches", "reference.training.run:Run.fetch"
VALIDATE = "reference.training.evaluation:validate"
SIZES, STACKED = "size, length = self.microbatch_size, self.block_size", "self.within_vocabulary(np.stack(rows))"
ROW = "self.ids[window * length : window * length + length + 1]"
DONE = "return Done(loss_value, norm_value, int(tokens), following)"
DID = "did = run.update_once("
LOADED, RESTORED = "model.load_state_dict(kept)", "done = restore(run, folder) if folder is not None else 0"
START, SEED = "start = done * self.config.microbatches", "derive_seed(config.seed, update, fabric.global_rank)"
ENDLESS, SOURCED = "return itertools.islice(endless, start, None)", "train.batches_from(start,"
EVALUATED = "evaluate(run.fabric, run.wrapped, itertools.islice(batches, run.config.evaluate_batches))"
SCALE, BARE = "scale = fabric.world_size / shared[0]", "bare = create_optimizer(config, module, fabric.device)"
NUMBERED = "epochs, positions = np.divmod(numbers, self.sequences)"
TAKEN = "itertools.islice(batches, self.config.microbatches)"
WEIGHTS = "checkpoint.load_model(folder, run.module)"
EARLIER_ROWS = 'return [row for row in rows if int(row["step"]) < before]'
REST_DROPPED = """\
whole = self.sequences // self.microbatch_size * self.microbatch_size or self.sequences
    epochs, positions = np.divmod(numbers, whole)"""
RUNNING_MEAN = f"""\
seen = run.__dict__.setdefault("evaluated", [])
        seen.append({EVALUATED})
        return sum(seen) / len(seen)"""
ONE_LATE = 'run.__dict__.setdefault("losses", [did.loss]).append(did.loss) or run.losses[-2]'
NORM_OF_WEIGHTS = "sum(float(p.detach().float().square().sum()) for p in self.module.parameters()) ** 0.5"
OTHER_ORDER = f"""{START}
    if done and hasattr(train, "seed"):
        train = __import__("copy").copy(train)
        train.seed += done"""
COMPRESSED = f"""\
if hasattr(wrapped._forward_module, "register_comm_hook"):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        wrapped._forward_module.register_comm_hook(None, fp16_compress_hook)
    {BARE}"""

FAULTS: dict[str, list[Mutant]] = {
    "data": [
        mutant(
            "blind4-data-no-end-between-documents",
            "",
            "stanford-crfm/mistral#91, mosaicml/llm-foundry#199: documents are joined without the token that ends each",
            (
                "reference.data.tokenfile:TokenWriter.end_document",
                "self.append(np.array([self.end]), np.array([target]))",
                "pass",
            ),
        ),
        mutant(
            "blind4-data-windows-do-not-overlap",
            "",
            "Lightning-AI/litgpt at 26857050: windows are cut T + 1 tokens apart, so one target of each is lost",
            (
                MICROBATCHES,
                ROW,
                "self.ids[(at := min(window * (length + 1), self.tokens - length - 1)) : at + length + 1]",
            ),
        ),
        mutant(
            "blind4-data-rest-of-the-epoch-dropped",
            "",
            "a common slip: the sequences that fill no whole microbatch at the end of an epoch are left out",
            (PLACES, NUMBERED, REST_DROPPED),
        ),
        mutant(
            "blind4-data-batches-share-one-buffer",
            "",
            "a common slip: each batch is written over the one before, which may not have been used yet",
            (MICROBATCHES, SIZES, f"{SIZES}\n    buffer = torch.empty(size, length + 1, dtype=torch.int64)"),
            (MICROBATCHES, STACKED, f"buffer.copy_({STACKED})"),
        ),
        mutant(
            "blind4-data-first-batch-lost-to-a-look",
            "",
            "deepmodeling/deepmd-kit#4795: the first batch is taken to look at it, and never trained on",
            (BATCHES, SOURCED, "train.batches_from(start + 1,"),
            (BATCHES, ENDLESS, ENDLESS.replace("start", "start + 1")),
        ),
    ],
    "evaluation": [
        mutant(
            "blind4-evaluation-in-bits",
            "",
            "a common slip: bits per token where nats are declared",
            (EVALUATE, "return float(sums[0] / sums[1])", "return float(sums[0] / sums[1]) / 0.6931471805599453"),
        ),
        mutant(
            "blind4-evaluation-before-the-update",
            "",
            "a common slip: what is evaluated are the weights from before the update that it is logged for",
            (FIT, DID, f"before = validate(run, validation) if validates else None\n            {DID}"),
            (FIT, "validation_loss = validate(run, validation)", "validation_loss = before"),
        ),
        mutant(
            "blind4-evaluation-mean-of-all-so-far",
            "",
            "ludwig-ai/ludwig#1659, NVIDIA-NeMo/Speech#2045: the sums are not cleared between evaluations",
            (VALIDATE, f"return {EVALUATED}", RUNNING_MEAN),
        ),
        mutant(
            "blind4-evaluation-every-so-many-microbatches",
            "",
            "Lightning-AI/pytorch-lightning#12205, facebookresearch/DPR#31: the interval counts microbatches",
            (
                FIT,
                "is_due(update, config.evaluate_every, last)",
                "is_due((update + 1) * config.microbatches - 1, config.evaluate_every, last)",
            ),
        ),
        mutant(
            "blind4-evaluation-of-the-last-batch",
            "",
            "pytorch/tutorials#913, NVIDIA/DeepLearningExamples#299: each batch overwrites those before it",
            (EVALUATE, "sums[0] += batch_loss", "sums[0] = batch_loss"),
            (EVALUATE, "sums[1] += (targets", "sums[1] = (targets"),
        ),
    ],
    "reports": [
        mutant(
            "blind4-reports-loss-one-update-late",
            "",
            "a common slip: the loss that is reported is that of the update before",
            (FIT, "loss=did.loss,", f"loss={ONE_LATE},"),
        ),
        mutant(
            "blind4-reports-tokens-since-the-start",
            "",
            "a common slip: the tokens of an update are all tokens so far",
            (FIT, "tokens=did.tokens,", "tokens=did.tokens + (result.records[-1].tokens if result.records else 0),"),
        ),
        mutant(
            "blind4-reports-norm-of-the-weights",
            "",
            "a common slip: the norm of the weights is reported as that of the gradient",
            (UPDATE, DONE, DONE.replace("norm_value", NORM_OF_WEIGHTS)),
        ),
        mutant(
            "blind4-reports-seconds-since-the-start",
            "",
            "Lightning-AI/litgpt at 26857050: the time of an update is that since the start of the run",
            (FIT, "seconds=now - started,", "seconds=now - began,"),
        ),
        mutant(
            "blind4-reports-rows-twice-after-resume",
            "",
            "a common slip: updates that are done again after a resume stand in the file twice",
            ("reference.cli.loggers:read_rows", EARLIER_ROWS, "return rows"),
        ),
    ],
    "resume": [
        mutant(
            "blind4-resume-skips-an-update",
            "",
            "a common slip: a resumed run begins one update too late",
            (FIT, RESTORED, RESTORED.replace("restore(run, folder)", "restore(run, folder) + 1")),
        ),
        mutant(
            "blind4-resume-norms-keep-their-start",
            "",
            "pytorch/pytorch#141256: weights that a load passes over without a word stay as they were drawn",
            (
                "reference.checkpoint.folder:put_into",
                LOADED,
                'model.load_state_dict({n: own[n] if "norm" in n else t for n, t in kept.items()})',
            ),
        ),
        mutant(
            "blind4-resume-dropout-from-the-start",
            "",
            "facebookresearch/fairseq2#1038, vllm-project/speculators#1027: dropout begins again",
            (FIT, RESTORED, f'{RESTORED}\n        run.__dict__["first"] = done'),
            (UPDATE, SEED, SEED.replace("update", 'update - self.__dict__.get("first", 0)')),
        ),
        mutant(
            "blind4-resume-order-drawn-anew",
            "",
            "kyutai-labs/pocket-tts#287, huggingface/accelerate#2823: a resume draws another order",
            (BATCHES, START, OTHER_ORDER),
        ),
        mutant(
            "blind4-resume-does-all-updates-again",
            "",
            "kohya-ss/sd-scripts#1999: a resumed run does as many updates as a fresh one, and ends too late",
            (FIT, "range(done, config.updates):", "range(done, done + config.updates):"),
            (FIT, "last = update + 1 == config.updates", "last = update + 1 == done + config.updates"),
            (FIT, "upcoming = run.fetch(batches) if done < config.updates else []", "upcoming = run.fetch(batches)"),
        ),
    ],
    "distributed": [
        mutant(
            "blind4-distributed-shards-of-other-models",
            "",
            "Lightning-AI/litgpt#269, pytorch/torchtitan#166: each rank has a seed of its own",
            (BUILD_MODULE, "partial(GPT, model, config.seed)", "partial(GPT, model, config.seed + fabric.global_rank)"),
        ),
        mutant(
            "blind4-distributed-microbatches-divided-by-ranks",
            "",
            "keyonvafa/inductive-bias-probes#12, karpathy/nanoGPT#283: fewer microbatches on more ranks",
            (FETCH, TAKEN, "itertools.islice(batches, max(1, self.config.microbatches // self.fabric.world_size))"),
            (FIT, "len(upcoming) < config.microbatches", "not upcoming"),
        ),
        mutant(
            "blind4-distributed-gradients-travel-in-16-bits",
            "",
            "a common slip: gradients are compressed to float16 between the ranks, unasked",
            (SETUP, BARE, COMPRESSED),
        ),
        mutant(
            "blind4-distributed-averages-what-is-a-sum",
            "",
            "sanderwood/bgpt#5, ChenmienTan/RL2#11: gradients are divided by the number of ranks once too often",
            (UPDATE, SCALE, "scale = 1.0 / shared[0]"),
        ),
        mutant(
            "blind4-distributed-weights-loaded-on-rank-0-only",
            "",
            "a common slip: only rank 0 loads the checkpoint, and nobody sends it to the others",
            (RESTORE, WEIGHTS, f"if run.fabric.global_rank == 0:\n            {WEIGHTS}"),
        ),
    ],
}
