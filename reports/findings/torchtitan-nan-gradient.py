"""torchtitan: one NaN in one gradient, and all weights are NaN; the Trainer goes on.

Puts a NaN into one element of one gradient in update 2 of 4, as an overflow would. Clipping is on, as it is by default.
"""

from torchtitan_run import train

backwards = 0


def damage(gradient):
    global backwards
    backwards += 1
    if backwards == 2:
        gradient = gradient.clone()
        gradient[0] = float("nan")
    return gradient


def watch(trainer):
    (model,) = trainer.model_parts
    dict(model.named_parameters())["norm.weight"].register_hook(damage)

    def tell(*_):
        finite = [bool(weight.isfinite().all()) for weight in model.parameters()]
        told.append(f"update {backwards}: {sum(finite)} of {len(finite)} tensors are finite")

    trainer.optimizers.register_step_post_hook(tell)


told = []
lines = train("--training.steps=4", watch=watch)
print(*told, sep="\n")
print(*(line.partition("memory:")[0].strip() for line in lines if line.startswith("step:")), sep="\n")
