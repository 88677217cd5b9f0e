"""Rows of instruction data, tokenizers that they need, and what is to become of them, written out."""

import json
import random

from flipproof.models.load import byte_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|endoftext|>"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TELLING_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}<|endoftext|>{% else %}{{ m['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
)
ALPACA = {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"}
ALPACA_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd the numbers.\n\n"
    "### Input:\n1 and 2\n\n### Response:"
)
SHORT = {"instruction": "Say yes.", "output": "yes"}
SHORT_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay yes.\n\n### Response:"
)
CHAT = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "Thanks."},
    ]
}
SHAREGPT = {
    "conversations": [
        {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
        for m in CHAT["messages"]
    ]
}
END = 256  # of text, as bytes have it


def tokenizer_with(template=CHAT_TEMPLATE):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def rows_of(kind, count, seed=0):
    """Rows of one format, whose prompts and answers have different lengths."""
    rng = random.Random(seed)

    def text(least, most):
        return "".join(rng.choices("abcdefgh ", k=rng.randint(least, most))).strip() or "a"

    made = {
        "alpaca": lambda: {"instruction": text(1, 6), "input": "", "output": text(1, 9)},
        "prompt_completion": lambda: {"prompt": text(1, 12), "completion": text(1, 9)},
        "chat": lambda: {
            "messages": [{"role": role, "content": text(1, 5)} for role in ("user", "assistant", "user", "assistant")]
        },
    }[kind]
    return [made() for _ in range(count)]


def write_rows(path, rows):
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples_in(text):
    """(ids, which have a loss) of each sample of packed text, as lists, by a loop over its marks."""
    found = []
    for ids, marks in zip(text.sequences.tolist(), text.marks.tolist(), strict=True):
        for i, mark in zip(ids, marks, strict=True):
            if mark & 2:
                found.append(([], []))
            found[-1][0].append(i)
            found[-1][1].append(bool(mark & 1))
    return found
