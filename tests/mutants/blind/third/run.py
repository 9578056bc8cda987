"""Faults of a run: data, evaluation, reports, resume, several ranks."""

from tests.mutants.planting import EVALUATE, FIT, RESTORE, SETUP, UPDATE, Mutant, mutant

MICROBATCHES, PLACES = "reference.data.tokens:TokenData.microbatches", "reference.data.tokens:TokenData.places"
PUT_INTO, BATCHES = "reference.checkpoint.folder:put_into", "reference.training.run:Run.batches"
ORDER, STACKED = "shuffled(positions[here], self.sequences, self.seed, epoch)", "self.within_vocabulary(np.stack(rows))"
DONE = "return Done(loss_value, norm_value, int(tokens), following)"
SPLIT, SUMMED = "ids, targets = split_targets(batch, fabric.device)", 'sums = reduce(fabric, sums, "sum")'
SCALE, BACKWARD = "scale = fabric.world_size / shared[0].clamp(min=1)", "fabric.backward(loss)"
WRAPPED = "wrapped = fabric.setup_module("
MEANS_OF_RANKS = """\
mean = reduce(fabric, (sums[0] / sums[1].clamp(min=1)).reshape(1), "mean")
    sums = torch.cat((mean, reduce(fabric, sums[1:].clone(), "sum").clamp(max=1)))"""
SHUFFLED_BY_RANK = """\
type(self).places(
                __import__("types").SimpleNamespace(sequences=self.sequences, seed=self.seed + rank),
                numbers.reshape(-1),
            )"""
NORMS_APART = f"""\
module._ddp_params_and_buffers_to_ignore = [name for name, _ in module.named_parameters() if "norm" in name]
    {WRAPPED}"""
AVERAGED = 'run.__dict__.setdefault("losses", []).append(did.loss) or sum(run.losses) / len(run.losses)'

FAULTS: dict[str, list[Mutant]] = {
    "data": [
        mutant(
            "blind3-data-never-shuffled",
            "",
            "cleverhans-lab/cleverhans#232: training does not shuffle the data",
            (PLACES, ORDER, "positions[here]"),
        ),
        mutant(
            "blind3-data-seed-ignored",
            "",
            "Lightning-AI/litgpt#1425, meta-pytorch/torchtune#2339: the order has always the same seed",
            (PLACES, ORDER, ORDER.replace("self.seed", "0")),
        ),
        mutant(
            "blind3-data-ids-wrap-at-16-bits",
            "",
            "huggingface/datatrove#118, allenai/open-instruct#1862: ids above 65535 begin again at 0",
            (
                "reference.data.tokens:TokenData.within_vocabulary",
                "ids.astype(np.int64)",
                "ids.astype(np.uint16).astype(np.int64)",
            ),
        ),
        mutant(
            "blind3-data-end-of-turn-is-no-target",
            "",
            "meta-pytorch/torchtune#949, mll-lab-nu/RAGEN#59: the model never learns to stop",
            ("reference.data.encode:write_chats", "bool(targets[end])", "False"),
        ),
        mutant(
            "blind3-data-end-at-each-cut",
            "",
            "axolotl-ai-cloud/axolotl#3809, unslothai/unsloth#10734: an end of document where a window is cut",
            (MICROBATCHES, STACKED, f"{STACKED}\n            ids[:, -1] = self.end_of_document"),
        ),
    ],
    "evaluation": [
        mutant(
            "blind3-evaluation-in-training-mode",
            "",
            "wolny/pytorch-3dunet#53, nshaud/DeepHyperX#51: eval() is not called for the validation",
            ("reference.model.modes:evaluation_mode", "model.eval()", "pass"),
        ),
        mutant(
            "blind3-evaluation-of-training-data",
            "",
            "huggingface/transformers#8295: the validation reads the training split",
            (FIT, "validate(run, validation)", "validate(run, train)"),
        ),
        mutant(
            "blind3-evaluation-one-update-early",
            "",
            "OpenRLHF/OpenRLHF#131: log, evaluation and save steps are counted wrongly",
            (FIT, "is_due(update, config.evaluate_every, last)", "is_due(update + 1, config.evaluate_every, last)"),
        ),
        mutant(
            "blind3-evaluation-ranks-weigh-alike",
            "",
            "PrimeIntellect-ai/prime-rl#1850, pytorch/torchtitan#2206: means are averaged, whatever they are of",
            (EVALUATE, SUMMED, MEANS_OF_RANKS),
        ),
        mutant(
            "blind3-evaluation-targets-not-shifted",
            "",
            "Lightning-AI/litgpt#419: training shifts the targets, validation does not",
            (EVALUATE, SPLIT, f"{SPLIT}\n            targets = torch.where(targets == IGNORE, targets, ids)"),
        ),
    ],
    "reports": [
        mutant(
            "blind3-reports-loss-since-the-start",
            "",
            "kohya-ss/musubi-tuner#79, allenai/allennlp#1706: an average over all that was trained so far",
            (FIT, "loss=did.loss,", f"loss={AVERAGED},"),
        ),
        mutant(
            "blind3-reports-norm-squared",
            "",
            "paiml/entrenar#311: the square of a norm is taken for the norm",
            (UPDATE, DONE, DONE.replace("norm_value", "norm_value**2")),
        ),
        mutant(
            "blind3-reports-tokens-of-the-last-microbatch",
            "",
            "axolotl-ai-cloud/axolotl#3688, karpathy/nanochat#177: the count is overwritten by each microbatch",
            (UPDATE, DONE, DONE.replace("int(tokens)", "fabric.world_size * int(count_targets(pairs[-1:]))")),
        ),
        mutant(
            "blind3-reports-rate-is-the-peak",
            "",
            "changlin31/DNA#23, catalyst-team/catalyst#60: another rate is printed than the one that is used",
            (FIT, 'float(run.bare.param_groups[0]["lr"])', "run.peaks[0]"),
        ),
        mutant(
            "blind3-reports-update-counts-microbatches",
            "",
            "awslabs/slapo#31, deepspeedai/DeepSpeed#2603: what is counted as a step is a microbatch",
            (FIT, "update=update + 1,", "update=(update + 1) * config.microbatches,"),
        ),
    ],
    "resume": [
        mutant(
            "blind3-resume-optimizer-starts-anew",
            "",
            "p-doom/jasmine#17, NVlabs/stylegan2-ada-pytorch#108: the state of the optimizer is not restored",
            (RESTORE, "load_optimizer_state(optimizer, saved)", "pass"),
        ),
        mutant(
            "blind3-resume-data-from-the-start",
            "",
            "KempnerInstitute/KempnerForge#51, paiml/entrenar#294: the loader begins at the first sample",
            (BATCHES, "start = done * self.config.microbatches", "start = 0"),
        ),
        mutant(
            "blind3-resume-newest-by-its-digits",
            "",
            "allenai/open-instruct#541, Lightning-AI/litgpt#661: 9 is taken for later than 10",
            ("reference.checkpoint.folder:checkpoints", "key=number", "key=lambda path: str(number(path))"),
        ),
        mutant(
            "blind3-resume-last-update-not-saved",
            "",
            "Lightning-AI/litgpt#1254, verl-project/verl#7516: no checkpoint at the end of training",
            (FIT, "is_due(update, config.save_every, last)", "is_due(update, config.save_every, False)"),
        ),
        mutant(
            "blind3-resume-optimizer-has-other-tensors",
            "",
            "pytorch/pytorch#102212, pytorch/tutorials#2522: load_state_dict(assign=True) behind the optimizer's back",
            (PUT_INTO, "model.load_state_dict(kept)", "model.load_state_dict(kept, assign=True)"),
        ),
    ],
    "distributed": [
        mutant(
            "blind3-distributed-ranks-weigh-alike",
            "",
            "huggingface/transformers#34242, vllm-project/speculators#942: each rank divides by its own tokens",
            (UPDATE, SCALE, "scale = 1.0 / count_targets(pairs).clamp(min=1)"),
        ),
        mutant(
            "blind3-distributed-gradients-added-up",
            "",
            "tensorflow/benchmarks#466: gradients of the ranks are summed, and not averaged",
            (UPDATE, BACKWARD, "fabric.backward(loss * fabric.world_size)"),
        ),
        mutant(
            "blind3-distributed-sharded-norm-of-one-rank",
            "",
            "pytorch/torchtitan#766, pytorch/pytorch#170862: sharded gradients are clipped by the norm of the shard",
            (
                "reference.training.sharding:ShardedStrategy.clip_gradients_norm",
                "distributed.all_reduce(squares)",
                "pass",
            ),
        ),
        mutant(
            "blind3-distributed-ranks-shuffle-apart",
            "",
            "NVlabs/LongLive#71, QwenLM/Qwen3-VL#1971: each rank has an order of its own, so samples come twice",
            (MICROBATCHES, "self.places(numbers.reshape(-1))", SHUFFLED_BY_RANK),
        ),
        mutant(
            "blind3-distributed-norms-not-averaged",
            "",
            "NVIDIA/Megatron-LM#1446, NVIDIA/TransformerEngine#441: norms differ between the ranks after a step",
            (SETUP, WRAPPED, NORMS_APART),
        ),
    ],
}
