"""DeepSpeed: engine.eval() leaves engine.training True; the module that the engine wraps is in eval mode."""

from deepspeed_run import engine_of, run


def look(rank):
    engine = engine_of(dropout=0.1)
    for mode in ("train", "eval"):
        getattr(engine, mode)()
        print(f"after engine.{mode}(): engine.training {engine.training}, its module's {engine.module.training}")


if __name__ == "__main__":
    run(look)
