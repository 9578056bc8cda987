"""The command line: ``python -m reference COMMAND``, which reference/__main__.py dispatches.

commands.py     prepare, generate, evaluate, export, import: their options, and what they do
train.py        the command train
settings.py     its settings, from preset, files and command line
starting.py     where a run starts: afresh, from its own checkpoint, from trained weights
presets.py      named runs
boundary.py     what a mistake raises deep inside a library, as one sentence
yamltext.py     YAML, in bounded time and memory
options.py      options from dataclasses, with jsonargparse
evaluation.py   the loss of a checkpoint over a split
loggers.py      metrics on disk
progress.py     the log and a live line on the terminal

It imports all other wings, each where it is used: help must come at once.
"""
