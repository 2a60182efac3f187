"""Our labels on a template that marks what an assistant writes: those of `return_assistant_tokens_mask`."""
import pytest

from uat_repro.models import tiny_tokenizer
from uat_repro.tokens import encode

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

CHATS = [
    [("user", "2 + 2?"), ("assistant", "It is 4.")],
    [("system", "Be short."), ("user", "Why?"), ("assistant", "Because."), ("user", "Why not?"), ("assistant", "é, 漢字")],
    [("user", "Say it."), ("assistant", "Say it.")],  # the answer stands in the prompt as well
]


@pytest.mark.parametrize("chat", CHATS, ids=str)
def test_labels_are_the_tokens_between_the_marks(chat):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKED
    messages = [dict(role=role, content=content) for role, content in chat]
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    row = encode(dict(messages=messages), tokenizer)
    assert row["input_ids"] == marked["input_ids"] and any(marked["assistant_masks"])
    assert [label != -100 for label in row["labels"]] == [*map(bool, marked["assistant_masks"])]
