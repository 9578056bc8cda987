"""The settings of a recipe, as torchtitan's command line has them."""

from conformance import Recipe


def command_line(recipe: Recipe, model: str, assets: str) -> list[str]:
    """Return the command line of a run.

    Args:
        recipe: what to train.
        model: name of the train spec, which has one flavor, "recipe".
        assets: folder of the tokenizer.
    """
    low, last = recipe.minimum_lr, recipe.updates
    settings = {
        "job.dump-folder": recipe.directory,
        "model.name": model,
        "model.flavor": "recipe",
        "model.hf-assets-path": assets,
        "metrics.log-freq": 1,
        "debug.seed": recipe.seed,
        "lr-scheduler.warmup-steps": recipe.warmup,
        "lr-scheduler.decay-type": "cosine",
        "lr-scheduler.decay-ratio": 0.0 if low is None else None,
        "lr-scheduler.min-lr-factor": (low or 0.0) / recipe.optimizer.rate,
        "training.dataset": "train",
        "training.steps": last,
        "training.seq-len": recipe.block_size,
        "training.local-batch-size": recipe.microbatch_size,
        "training.global-batch-size": recipe.update_size,
        "training.max-norm": recipe.clip or "inf",
        "training.dtype": "bfloat16" if recipe.precision == "bf16-true" else "float32",
        # With weights in bfloat16 too, the default is bfloat16; only float32 throughout has to say so.
        "training.mixed-precision-param": "float32" if recipe.precision == "32-true" else "bfloat16",
        "activation-checkpoint.mode": "full" if recipe.activation_checkpointing else "none",
        "checkpoint.interval": recipe.save_every or last,
        "checkpoint.keep-latest-k": 0,
        "validation.dataset": "validation",
        "validation.freq": recipe.evaluate_every or last,
        "validation.steps": recipe.evaluate_batches or -1,
        "validation.seq-len": recipe.block_size,
        "validation.local-batch-size": recipe.microbatch_size,
    }
    if recipe.resume is not None:
        settings["checkpoint.initial-load-path"] = recipe.resume.find("step-*")
    words = [f"--{name}={value}" for name, value in {**settings, **of_optimizer(recipe)}.items()]
    words += [
        "--metrics.enable-tensorboard",
        "--metrics.disable-color-printing",
        "--debug.deterministic",
        "--debug.deterministic-warn-only",
        "--checkpoint.enable",
        "--checkpoint.no-last-save-model-only",
        "--checkpoint.no-initial-load-model-only",
    ]
    words += ["--compile.enable"] if recipe.compile else []
    words += ["--validation.enable"] if recipe.evaluate or recipe.evaluate_every else []
    return words


def of_optimizer(recipe: Recipe) -> dict[str, object]:
    """Return the settings of the optimizer. What torchtitan does not know goes to its command line, too."""
    given = dict(recipe.optimizer.arguments)
    if "betas" in given:
        given["beta1"], given["beta2"] = given.pop("betas")
    if "fused" in given:
        given["implementation"] = "fused" if given.pop("fused") else "for-loop"
    given["name"] = recipe.optimizer.class_path.rpartition(".")[2]
    return {f"optimizer.{name}": value for name, value in given.items()}
