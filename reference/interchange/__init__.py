"""Interchange: to and from the files of Hugging Face transformers, without importing transformers.

adapter.py       export what LoRA trained, for peft
huggingface.py   export a checkpoint, import a folder
layout.py        how transformers names settings and tensors of GPT-2 and Llama

It imports the wings model, finetuning, data and checkpoint.
"""
