"""Supervised fine-tuning of a tiny GPT-2 with TRL's SFTTrainer, on prompts and completions of token ids."""

import random

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

VOCAB, END, PAD = 79, 1, 2


def conversations(count, seed):
    """A prompt of a few ids, and a completion that counts on from the last one."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        prompt = [draw.randrange(3, VOCAB) for _ in range(draw.randrange(3, 9))]
        answer = [3 + (prompt[-1] + i) % (VOCAB - 3) for i in range(draw.randrange(4, 14))] + [END]
        mask = [0] * len(prompt) + [1] * len(answer)
        rows.append({"input_ids": prompt + answer, "completion_mask": mask})
    return Dataset.from_list(rows)


def main():
    set_seed(2)
    config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
                        eos_token_id=END, pad_token_id=PAD)
    model = GPT2LMHeadModel(config)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2")
    arguments = SFTConfig(
        output_dir="out",
        use_cpu=True,
        bf16=False,
        max_steps=6,
        completion_only_loss=True,
        learning_rate=1e-3,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        gradient_checkpointing=False,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=2,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=conversations(60, seed=4),
        processing_class=tokenizer,
    )
    trainer.train()


if __name__ == "__main__":
    main()
