"""Faults of what a logit depends on."""

from tests.mutants.planting import mutant

ATTENTION = "reference.model.gpt:Attention.forward"
FORWARD = "reference.model.gpt:GPT.forward"

MUTANTS = [
    mutant("not-causal", "CAUSAL-1", "transformers#48745", (ATTENTION, "is_causal=past == 0", "is_causal=False")),
    mutant(
        "mask-one-too-wide",
        "CAUSAL-1",
        "-",
        # Each query meets the keys and values of the next place.
        (ATTENTION, "past = 0 if", "k, v = k.roll(-1, 2), v.roll(-1, 2); past = 0 if"),
    ),
    mutant(
        "batch-and-time-exchanged",
        "CAUSAL-2",
        "karpathy.github.io/2019/04/25/recipe",
        (
            ATTENTION,
            ".view(batch, time, -1, self.head_size).transpose(1, 2)",
            ".view(time, batch, -1, self.head_size).permute(1, 2, 0, 3)",
        ),
    ),
    mutant(
        "statistics-over-batch",
        "CAUSAL-2",
        "Megatron-DeepSpeed#335",
        ("reference.model.gpt:GPT.forward", "x = self.dropout(x)", "x = self.dropout(x - x.mean(0, keepdim=True))"),
    ),
    mutant(
        "window-of-zero",
        "CAUSAL-3",
        "unslothai/unsloth#8253",
        (
            ATTENTION,
            "self.proj(y.transpose",
            "self.proj(v.repeat_interleave(self.n_head // self.n_kv_head, 1).transpose",
        ),
    ),
    mutant(
        "positions-reach-nothing",
        "CAUSAL-4",
        "Soup#793, Megatron-LM#6305",
        (FORWARD, "x = x + self.position(torch.arange(start, end, device=ids.device))", "pass"),
    ),
    mutant(
        "positions-all-equal",
        "CAUSAL-4",
        "position ids of zeros, as padding on the left makes them",
        (FORWARD, "torch.arange(start, end, device=ids.device)", "torch.arange(start, end, device=ids.device) * 0"),
    ),
    mutant(
        "rotary-not-applied",
        "CAUSAL-4",
        "Soup#793",
        (ATTENTION, "rotary(q, past), rotary(k, past)", "q, k"),
    ),
    mutant(
        "causal-at-even-lengths-only",
        "CAUSAL-1",
        "huggingface/transformers#28215, facebookresearch/xformers#66: a mask for another length",
        ("reference.model.gpt:Attention.forward", "is_causal=past == 0,", "is_causal=past == 0 and time % 2 == 0,"),
    ),
    mutant(
        "causal-mask-lost-with-dropout",
        "CAUSAL-5",
        "keras-team/keras#23038: the mask is dropped where dropout takes another path",
        (
            "reference.model.gpt:Attention.forward",
            "is_causal=past == 0,",
            "is_causal=past == 0 and not (self.training and self.dropout),",
        ),
    ),
    mutant(
        "mask-lost-with-shared-heads",
        "CAUSAL-6",
        "keras-team/keras#23038: grouped-query attention has the same defect",
        (
            "reference.model.gpt:Attention.forward",
            "is_causal=past == 0,",
            "is_causal=past == 0 and self.n_kv_head == self.n_head,",
        ),
    ),
    mutant(
        "mask-lost-in-16-bits",
        "CAUSAL-1",
        "lightseekorg/tokenspeed#469: the kernel for bfloat16 has no causal mask, that for other dtypes has",
        (
            "reference.model.gpt:Attention.forward",
            "is_causal=past == 0,",
            "is_causal=past == 0 and q.dtype != torch.bfloat16,",
        ),
    ),
    mutant(
        "mask-lost-for-a-single-sequence",
        "CAUSAL-1",
        "facebookresearch/xformers#104, huggingface/transformers#30311: dropped where there is no padding mask",
        ("reference.model.gpt:Attention.forward", "is_causal=past == 0,", "is_causal=past == 0 and batch > 1,"),
    ),
]
