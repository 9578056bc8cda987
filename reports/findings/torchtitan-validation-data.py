"""torchtitan: each validation sees other sequences of the same validation set, and weighs each batch the same.

Five documents of 20 tokens, cut into pieces of 17 (16 inputs, each with the next token as its target): five pieces, and
15 tokens are left over. The rate is 0, so the weights stay as they are.
"""

from torchtitan_run import LENGTH, train

first, sums, told = {}, [], []


def watch(trainer):
    def note(model, args):
        if not model.training:
            first.setdefault(trainer.step, []).extend(args[0][:, 0].tolist())

    def judged(logits, labels):
        total = loss(logits, labels)
        sums.append((total.item(), labels.numel()))
        return total

    def log(**given):
        told.append(given["loss"])
        log_validation(**given)

    loss, log_validation = trainer.validator.loss_fn, trainer.metrics_processor.log_validation
    trainer.validator.loss_fn, trainer.metrics_processor.log_validation = judged, log
    trainer.model_parts[0].register_forward_pre_hook(note)


options = ["--optimizer.lr=0.0", "--validation.enable", "--validation.freq=1"]
train("--training.steps=3", *options, documents=20, watch=watch)
for (step, tokens), reported in zip(first.items(), told, strict=True):
    batches = [sums.pop(0) for _ in range((len(tokens) + 1) // 2)]
    mean = sum(total for total, _ in batches) / sum(count for _, count in batches)
    sizes = [count // LENGTH for _, count in batches]
    print(f"after update {step}: sequences begin with the tokens {tokens}, in batches of {sizes}")
    print(f"    reported: {reported:.4f}; mean over all targets: {mean:.4f}")
