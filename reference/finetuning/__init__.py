"""Fine-tuning: frozen and quantised weights, LoRA beside them, and StableEmbedding in front of a trained table.

config.py      what is frozen, quantised and adapted
prepare.py     from a module with trained weights to one that is fine-tuned
quantised.py   linear layers of bitsandbytes: 4 and 8 bits, from and to a checkpoint
adapters.py    LoRA by peft
closest.py     the norm of a StableEmbedding that changes a trained table least
merged.py      one plain weight per layer again

It imports the wing model, reference.config and reference.errors; bitsandbytes and peft where they are used.
"""

from reference.finetuning.config import FinetuneConfig as FinetuneConfig
