"""Training: one update from top to bottom, the loop around it, and what a run needs.

run.py          one update: batches, forward, loss, backward, clip, step
trainer.py      the loop: evaluate, save, stop, resume
setup.py        from a configuration to a run: device and ranks, module, optimizer
batches.py      where batches come from, and whether they fit the model
evaluation.py   the loss of a run on data that is not trained on
saving.py       what a run puts into a checkpoint, and how it goes on from one
launch.py       Fabric: accelerator, ranks, strategy, precision
replication.py  data parallelism where the loss is compiled: one exchange of gradients in an update
sharding.py     FSDP: a part of each tensor on each rank, and checkpoints that are whole
float8.py       linear layers that multiply in float8
schedule.py     the learning rate
stopping.py     Ctrl-C and SIGTERM
throughput.py   model FLOPs utilisation

It imports the wings model, optimizers and checkpoint. Import ``Trainer`` from ``reference``.
"""
