"""Conversations as nobody would write them: what holds for every record, template and file (hypothesis)."""
import json
from itertools import pairwise

from hypothesis import example, given, strategies as st
import pytest

from test_tokens import TEMPLATES, answers, tiny, whole
from uat_repro.records import load_records, to_messages
from uat_repro.tokens import encode

SPECIAL = sorted({token for _, special, _ in TEMPLATES.values() for token in special})
ODD = ["assistant", "cat <filename>", "#### 7", "\u2028", "\ue0000\ue001", "{{ 7 }}", "[INST]", "\x00", "\x1b[31m",
       "\r\n"]
piece = st.text(st.characters(), max_size=12) | st.sampled_from(SPECIAL + ODD)  # half surrogates too
text = st.lists(piece, max_size=4).map(" ".join) | st.builds(str.__mul__, piece, st.integers(0, 300))
value = text | st.none() | st.integers() | st.floats() | st.booleans()
wrong = st.lists(text, min_size=1, max_size=2) | st.dictionaries(text, text, min_size=1, max_size=1)
role = st.sampled_from(["user", "assistant", "human", "gpt", "system"])
mark = st.sampled_from([0, 1, None, 1.0, True, .5, 2])
marks = st.dictionaries(st.sampled_from(["weight", "train"]), mark, max_size=2)


def turn(who, said):
    "One turn in OpenAI's form or in ShareGPT's."
    return st.builds(lambda r, v, more: {who: r, said: v, **more}, role, value | wrong, marks)

def dialogue(turns):
    "A record of rounds: what is asked, and the answer with its marks."
    return {"messages": [m for asked, reply, more in turns for m in (
        dict(role="user", content=asked), dict(role="assistant", content=reply, **more))]}


rounds = st.lists(st.tuples(text.map("Q {}".format), text.map("{} A".format), marks), min_size=1, max_size=4)
records = st.one_of(
    rounds.map(dialogue), rounds.map(dialogue).map(lambda record: dict(record, system="Be brief.")),
    st.fixed_dictionaries({"messages": st.lists(turn("role", "content"), max_size=7)}, optional={"id": text}),
    st.fixed_dictionaries({"conversations": st.lists(turn("from", "value"), max_size=7)}, optional={"system": value}),
    st.fixed_dictionaries({"instruction": value, "output": value},
                          optional={"input": value, "system": value, "history": st.lists(st.tuples(text, text))}),
    st.fixed_dictionaries({"question": value, "answer": value | wrong}, optional={"context": value}),
    st.dictionaries(st.sampled_from(["messages", "instruction", "text"]), value | wrong, max_size=2))


def usable(record):
    "The messages of a record, or nothing; an error has one line."
    try: return to_messages(record)
    except ValueError as e:
        assert "record " in str(e) and "\n" not in str(e)
        return None


@given(records)
@example(record={"messages": [dict(role=r, content="0") for r in ("user", "system", "user", "assistant")]})
def test_messages(record):
    "Neighbours have different roles, an answer comes last, and the first one has a question before it; or a text is alone."
    messages = usable(record)
    if messages is None: return
    roles = [m["role"] for m in messages]
    if roles != ["text"]:
        assert all(a != b for a, b in pairwise(roles)) and roles[-1] == "assistant"
        assert "user" in roles[:roles.index("assistant")]
    assert all(m["content"] and m["content"] == m["content"].strip() for m in messages)
    json.dumps(messages, ensure_ascii=False).encode()  # no half surrogates
    assert to_messages({"messages": messages}) == messages


TOKENIZERS = {name: tiny(template, special) for name, (template, special, _) in TEMPLATES.items()}


@pytest.mark.parametrize("name", TEMPLATES)
@given(record=records)
@example(record={"question": "Q", "answer": "</think> so \ud83d"})
@example(record={"messages": [dict(role=r, content="0") for r in ("user", "assistant", "system", "assistant")]})
def test_labels(name, record):
    "Ids of the whole; labels are each assistant's text with its end of turn, and nothing else."
    tokenizer, end, messages = TOKENIZERS[name], TEMPLATES[name][2], usable(record)
    if messages is None or messages[0]["role"] == "text": return
    spoken = [m for m in messages if m["role"] == "assistant"]
    learned = [m for m in spoken[-(name == "rewrites"):] if m.get("weight", 1)]
    try: row = encode(record, tokenizer)
    except ValueError as e:
        assert str(e).startswith("record ") and "\n" not in str(e)
        refused = name == "gemma" and any(m["role"] == "system" for m in messages)
        thought = any("</think>" in m["content"] for m in spoken)
        assert refused or thought or not learned
        return
    assert row["input_ids"] == whole(record, tokenizer)
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    def ending(m): return end if end is not None else "<|return|>" if m is spoken[-1] else "<|end|>"
    assert "".join(answers(row, tokenizer)) == "".join(m["content"] + ending(m) for m in learned)


@given(st.lists(records | st.integers() | st.text(max_size=9), min_size=1, max_size=4), st.sampled_from([None, 1]),
       st.integers(0, 40), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_files(tmp_path_factory, several, indent, lost, encoding):
    "An array, lines, or objects over several lines, perhaps cut off: records, or an error with the file's name."
    path = tmp_path_factory.getbasetemp() / "odd.json"
    lines = "\n".join(json.dumps(record, indent=indent) for record in several)
    for content in json.dumps(several, indent=indent), lines:
        path.write_bytes(content[:len(content) - lost].encode(encoding, "surrogatepass"))
        for strict in True, False:
            try: found = load_records(path, "all", strict=strict)
            except ValueError as e: assert "odd.json" in str(e) and "\n" not in str(e)
            else: assert all(usable(record) for record in found)
