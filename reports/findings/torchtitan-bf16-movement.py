"""torchtitan: with training.dtype = "bfloat16", small updates are lost, and nothing is said.

Trains for 20 updates at a constant rate with weights in bfloat16 and in float32, and compares how far they moved
(norms: the weights of the RMSNorms, which start at 1). What is logged, printed or warned is searched.
"""

from torchtitan_run import train


def movement(dtype, rate):
    weights, before = {}, {}

    def watch(trainer):
        weights.update(trainer.model_parts[0].named_parameters())
        before.update({name: weight.detach().double() for name, weight in weights.items()})

    lines = train(f"--training.dtype={dtype}", "--training.steps=20", f"--optimizer.lr={rate}", watch=watch)
    moved = {name: (weight.detach().double() - before[name]).abs().sum().item() for name, weight in weights.items()}
    return sum(moved.values()), sum(moved[name] for name in moved if "norm" in name), lines


said = []
for rate in (1e-3, 1e-4, 1e-5, 1e-6):
    (exact, exact_norms, _), (coarse, norms, lines) = movement("float32", rate), movement("bfloat16", rate)
    said += lines
    print(f"lr {rate:.0e}: bfloat16 / float32, all weights {coarse / exact:.1%}, norms {norms / exact_norms:.1%}")
words = ("bf16", "bfloat16", "round", "precision", "master")
found = {line for line in said if any(word in line.lower() for word in words)}
print(f"of {len(said)} lines, with {', '.join(words)}: {sorted(found)}")
