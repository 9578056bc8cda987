"""Pretrain a tiny GPT-2 with transformers' Trainer on blocks of a synthetic corpus."""

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, default_data_collator, set_seed

BLOCK, VOCAB = 24, 101


class Blocks(Dataset):
    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        stream = torch.randint(1, 8, (count * BLOCK,), generator=generator).cumsum(0) % VOCAB
        self.blocks = stream.view(count, BLOCK)

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        ids = self.blocks[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def main():
    set_seed(5)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    )
    model = GPT2LMHeadModel(config)
    arguments = TrainingArguments(
        output_dir="out", use_cpu=True, max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=2e-3, weight_decay=0.1, max_grad_norm=1.0, warmup_steps=2, lr_scheduler_type="cosine",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=5,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Blocks(80, seed=1), eval_dataset=Blocks(8, seed=2),
        data_collator=default_data_collator,
    )
    trainer.train()
    print(trainer.evaluate())


if __name__ == "__main__":
    main()
