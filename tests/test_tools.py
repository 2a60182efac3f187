"""Calls of tools: the tokens are those of the whole conversation, and only what the assistant gives is learned."""
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from samples import fails
from uat_repro.models import tiny_tokenizer
from uat_repro.records import load_records, record_id, to_messages
from uat_repro.tokens import encode

pytestmark = pytest.mark.skipif(not find_spec("trl"), reason="TRL has the templates: pip install trl")
TOOLS = [dict(type="function", function=dict(name=name, description="Look it up.", parameters=dict(
    type="object", properties=dict(city=dict(type="string", description="Its name"))))) for name in ("weather", "time")]
USER = dict(role="user", content="Rome or Paris?")


def call(city, name="weather"): return dict(type="function", function=dict(name=name, arguments=dict(city=city)))

def said(content="", *calls):
    return dict(role="assistant", content=content) | (dict(tool_calls=[*calls]) if calls else {})

def result(content): return dict(role="tool", content=content)

def record(*messages, tools=TOOLS): return dict(messages=[*messages], tools=tools)


CHAT = record(USER, said("", call("Rome"), call("Paris", "time")), result("dry"), result("noon"), said("Rome."),
              dict(role="user", content="And now?"), said("", call("Oslo")), result("<b>"), said("Oslo."))


def with_template(name):
    folder, tokenizer = Path(find_spec("trl").origin).parent / "chat_templates", tiny_tokenizer()
    tokenizer.chat_template = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer

def whole(record, tokenizer, **how):
    "What the template makes of the conversation, by transformers alone."
    return tokenizer.apply_chat_template(record["messages"], tools=record["tools"], date_string="26 Jul 2024",
                                         return_dict=True, **how)

def learned(row, tokenizer):
    "The labelled stretches as text."
    parts, before = [], -100
    for label in row["labels"]:
        if label != -100: parts[-1].append(label) if before != -100 else parts.append([label])
        before = label
    return [tokenizer.decode(part) for part in parts]


def chatml(message):
    calls = "".join('\n<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>' % (
        c["function"]["name"], json.dumps(c["function"]["arguments"], ensure_ascii=False))
        for c in message.get("tool_calls", ()))
    return (message["content"] + calls).lstrip("\n") + "<|im_end|>"

def llama(message):
    one = message["tool_calls"][0]["function"] if "tool_calls" in message else None
    text = message["content"] if one is None else '{"name": "%s", "parameters": %s}' % (
        one["name"], json.dumps(one["arguments"], ensure_ascii=False))
    return text + "<|eot_id|>"

WRITTEN = dict(qwen2_5=chatml, qwen3_instruct_2507=chatml, llama3_1=llama)  # an answer, as we read these templates
TOKENIZERS = {name: with_template(name) for name in WRITTEN} if find_spec("trl") else {}


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "qwen3_vl", "lfm2_v2"])
def test_labels_are_what_the_templates_of_trl_mark(name):
    "TRL's templates for training mark what is generated. Theirs may hold the line breaks around an answer."
    tokenizer, marking = with_template(name), with_template(f"{name}_training")
    row, theirs = encode(CHAT, tokenizer), whole(CHAT, marking, return_assistant_tokens_mask=True)
    assert row["input_ids"] == whole(CHAT, tokenizer)["input_ids"] == theirs["input_ids"]
    marked = dict(labels=[i if m else -100 for i, m in zip(theirs["input_ids"], theirs["assistant_masks"])])
    assert learned(row, tokenizer) == [text.strip() for text in learned(marked, tokenizer)]
    assert len(learned(row, tokenizer)) == 4


plain = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp", "Co"]), min_size=1, max_size=9)
MARKS = "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<tool_call>", "</tool_response>"
text = plain | st.sampled_from(MARKS).map("a{}b".format)
value = text | st.integers(-9, 9) | st.booleans() | st.lists(text, max_size=2)
calls = st.builds(lambda name, arguments: dict(type="function", function=dict(name=name, arguments=arguments)),
                  st.sampled_from(["weather", "time"]), st.dictionaries(text, value, max_size=3))
asks = st.tuples(calls, text).map(lambda pair: [said("", pair[0]), result(pair[1])])
rounds = st.builds(lambda question, steps, answer: [dict(role="user", content=question), *sum(steps, []), said(answer)],
                   text, st.lists(asks, max_size=2), text)


@pytest.mark.parametrize("name", WRITTEN)
@settings(max_examples=60)
@given(rounds=st.lists(rounds, min_size=1, max_size=3), cut=st.booleans())
def test_every_answer_and_call_is_learned_and_nothing_else(name, rounds, cut):
    messages = sum(rounds, [])
    if cut and "tool_calls" in messages[-3 % len(messages)]: messages = messages[:-2]  # the last word is a call
    tokenizer, given = TOKENIZERS[name], record(*messages)
    row = encode(given, tokenizer)
    assert row["input_ids"] == whole(given, tokenizer)["input_ids"]
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    assert learned(row, tokenizer) == [WRITTEN[name](m) for m in messages if m["role"] == "assistant"]


def test_what_a_template_leaves_out_is_refused():
    lost = "does not write its tools or calls"
    fails("record ", lost, call=lambda: encode(CHAT, tiny_tokenizer()))  # ChatML without tools
    for name in "llama3_1", "llama3_2":
        spoken = record(USER, said("I ask.", call("Rome")), result("dry"), said("Rome."))
        fails(lost, call=lambda: encode(spoken, with_template(name)))
    fails("refused by the chat template", call=lambda: encode(CHAT, with_template("gemma3")))


def test_a_weight_of_zero_keeps_a_call_out():
    tokenizer, last = TOKENIZERS["qwen2_5"], said("Rome.")
    row = encode(record(USER, said("", call("Rome")) | dict(weight=0), result("dry"), last), tokenizer)
    assert learned(row, tokenizer) == [chatml(last)]


def test_calls_as_openai_has_them():
    asked = dict(id="c1", type="function", index=0, function=dict(name="weather", arguments='{"city": "Rome"}'))
    theirs = record(USER, dict(role="assistant", content=None, tool_calls=[asked]),
                    dict(role="tool", tool_call_id="c1", content="dry"), said("Rome."), tools=json.dumps(TOOLS))
    messages = to_messages(theirs)
    assert messages[1] == said("", dict(call("Rome"), id="c1"))
    assert messages[2] == result("dry") | dict(tool_call_id="c1")
    assert messages[0] == USER | dict(tools=TOOLS) and to_messages(dict(messages=messages)) == messages


def test_calls_and_tools_are_part_of_the_id(tmp_path):
    other = record(USER, said("", call("Oslo"), call("Paris", "time")), *CHAT["messages"][2:])
    assert len({record_id(to_messages(r)) for r in (CHAT, other, CHAT | dict(tools=TOOLS[:1]))}) == 3
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, (CHAT, other, CHAT))))
    loaded = load_records(tmp_path / "mine.jsonl", "all")
    assert [r["messages"] for r in loaded] == [to_messages(CHAT), to_messages(other)]
    assert encode(loaded[0], TOKENIZERS["qwen2_5"])["input_ids"] == encode(CHAT, TOKENIZERS["qwen2_5"])["input_ids"]


@pytest.mark.parametrize(("messages", "complaint"), [
    ([USER, said("", call("Rome")), said("Rome.")], "a tool call without result"),
    ([USER, said("", call("Rome")), USER, said("Rome.")], "a tool call without result"),
    ([USER, result("dry"), said("Rome.")], "a result without call"),
    ([said("", call("Rome")), result("dry"), said("Rome.")], "a result without call"),  # nobody asked
    ([USER, said("", dict(function=dict(name="weather", arguments="Rome")))], "tool_calls that are no list of"),
    ([USER, said("", "weather")], "tool_calls that are no list of functions in OpenAI's format"),
    ([USER, said("Rome.") | dict(function_call=dict(name="weather"))], "write it as tool_calls")])
def test_calls_that_cannot_be_used(messages, complaint):
    fails("record ", complaint, call=lambda: to_messages(record(*messages)))


@pytest.mark.parametrize("tools", [[{}], ["weather"], [dict(function="weather")], "weather", 7])
def test_tools_that_are_none(tools):
    fails("record ", "tools that are no list of functions", call=lambda: to_messages(record(USER, said("4"), tools=tools)))


def test_tools_on_a_later_turn_are_named(tmp_path, caplog):
    late = dict(messages=[USER, said("", call("Rome")) | dict(tools=TOOLS)])
    (tmp_path / "late.jsonl").write_text(json.dumps(late))
    assert "tools" not in load_records(str(tmp_path / "late.jsonl"), "all")[0]["messages"][0]
    assert "field 'turn.tools' is not read" in caplog.text
