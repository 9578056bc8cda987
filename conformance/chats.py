"""Chats to train on: conversations, and a tokenizer with a chat template that turns them into known tokens.

The words of a user and those of the assistant have different ids, so a clause can see from the ids that go into a model
who speaks, however a stack cuts or joins conversations.
"""

import json
import random
from pathlib import Path

Message = dict[str, str]
END, USER, ASSISTANT = "<|endoftext|>", "<|user|>", "<|assistant|>"
WORDS = 125  # ids below are words: "w0", "w1", ...
USER_ID, ASSISTANT_ID, END_ID = WORDS, WORDS + 1, WORDS + 2
ASKING, ANSWERING = range(1, 60), range(60, WORDS)
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    f"{USER}{{{{ message['content'] }}}}{END}"
    f"{{% else %}}{ASSISTANT}{{% generation %}}{{{{ message['content'] }}}}{END}{{% endgeneration %}}"
    f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)


def conversations(seed: int, count: int = 16) -> list[list[Message]]:
    """Return conversations of two or three questions and answers, of one to four words each."""
    draw = random.Random(seed)

    def said(role: str, ids: range) -> Message:
        return {"role": role, "content": " ".join(f"w{draw.choice(ids)}" for _ in range(draw.randint(1, 4)))}

    return [
        [said(*part) for _ in range(draw.randint(2, 3)) for part in (("user", ASKING), ("assistant", ANSWERING))]
        for _ in range(count)
    ]


def write_tokenizer(folder: Path) -> Path:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, and return the path of the first.

    Each word is a token, of the id in its name; each turn begins with the role and ends with ``<|endoftext|>``.
    """
    names = {USER: USER_ID, ASSISTANT: ASSISTANT_ID, END: END_ID}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    words = {f"w{number}": number for number in range(WORDS)}
    model = {"type": "WordLevel", "vocab": words | names, "unk_token": "w0"}
    added = [{"id": number, "content": name} | flags for name, number in names.items()]
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    content = parts | {"version": "1.0", "added_tokens": added, "model": model}
    content |= {"pre_tokenizer": {"type": "WhitespaceSplit"}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder / "tokenizer.json"
