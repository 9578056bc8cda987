"""A reference GPT and its training loop: small enough to read, and right in every promise.

The promises that clauses of the conformance suite can judge are judged by it, and the rest by tests/reference. The
public names are few::

    from reference import GPT, GPTConfig, TrainConfig, Trainer

    trainer = Trainer(GPTConfig.tiny(), TrainConfig(updates=100))
    result = trainer.fit(train_batches, validation_batches)

The same from the command line, with data, presets and progress: ``python -m reference --help``.

Names are loaded on first use, so that ``import reference`` costs nothing until torch is needed. ``__init__.pyi`` beside
this file says where they come from.
"""

import reference.interrupts  # isort: skip # noqa: F401 # first of all: Ctrl-C may come while the rest is imported

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
