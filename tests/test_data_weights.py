"""Weights of records, turns and tokens: from the data to the gradient, against formulas written out in a loop."""
import json, math
from importlib.util import find_spec
from pathlib import Path

from hypothesis import assume, given, strategies as st
import pandas as pd, pytest, torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset
from torch.nn.parallel import DistributedDataParallel
from transformers import DataCollatorWithFlattening, TrainingArguments

from examples import PAIRS, flat_grad, logits_of, rows, tokenizer
from test_tokens import TEMPLATES, letters, tiny
from test_training import InOrder, two_processes
from uat_repro.cli import main
from uat_repro.distillation import FrozenTeacher
from uat_repro.heatmaps import heatmap_html
from uat_repro.models import tiny_model
from uat_repro.objective import PRESETS, Objective
from uat_repro.records import load_records, record_id, to_messages
from uat_repro.tokens import Collator, encode, encode_all
from uat_repro.training import UncertaintyAwareTrainer

collate = Collator(tokenizer)


def weighted():
    "The examples with a random weight for each token; some are 0."
    draw, out = torch.Generator().manual_seed(0), rows()
    for row in out:
        w = 2 * torch.rand(len(row["labels"]), generator=draw)
        w[torch.rand(len(w), generator=draw) < .2] = 0
        row["loss_weights"] = w.tolist()
    return out


def gradient(o, data, parts):
    "Of one step, in micro-batches of these sizes."
    model, data, teacher = tiny_model(), iter(data), FrozenTeacher(tiny_model(seed=1))
    batches = [collate([next(data) for _ in range(n)]) for n in parts]
    total = sum(o.counts(b) for b in batches)
    for b in batches: o(model, b, teacher=teacher, num_items=total).loss.backward()
    return flat_grad(model)


def by_hand(o, model, teacher, data):
    "The equation of the notebook, token by token, for selection by number and by sequence or batch."
    batch = collate(data)
    log_p, log_q = (logits_of(m, batch).double().log_softmax(-1) for m in (model, teacher))
    groups = {}
    for b, row in enumerate(data):
        for t in range(1, len(row["labels"])):
            y, a = row["labels"][t], row["loss_weights"][t]
            if y == -100 or a == 0: continue
            p, q = log_p[b, t - 1], log_q[b, t - 1].detach()
            groups.setdefault(b if o.scope == "sequence" else 0, []).append((-p[y], (q.exp() * (q - p)).sum(), a))
    mask = kl = trained = distilled = 0.
    for tokens in groups.values():
        mean, kept = sum(a for *_, a in tokens) / len(tokens), math.ceil(o.keep * len(tokens))
        order = sorted(range(len(tokens)), key=lambda i: -tokens[i][0].item())
        rest = range(len(tokens)) if o.distill_on == "all" else order[kept:]
        mask, trained = mask + sum(tokens[i][2] * tokens[i][0] for i in order[:kept]), trained + mean * kept
        kl, distilled = kl + sum(tokens[i][2] * tokens[i][1] for i in rest), distilled + mean * len(rest)
    return mask / trained + o.distill_weight * kl / max(distilled, 1e-9)


@pytest.mark.parametrize("o", [Objective(distill_weight=.7), Objective(scope="sequence", keep=.4, distill_weight=.5),
                               Objective.preset("mle"), Objective.preset("mle_kl")], ids=str)
def test_the_gradient_is_that_of_a_loop(o):
    model, teacher, data = tiny_model().double(), tiny_model(seed=1).double(), weighted()
    loss = by_hand(o, model, teacher, data)
    loss.backward()
    student = tiny_model()
    out = o(student, collate(data), teacher=FrozenTeacher(tiny_model(seed=1)))
    out.loss.backward()
    torch.testing.assert_close(out.loss.double(), loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flat_grad(student).double(), flat_grad(model), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("o", [Objective.preset("document_masked_mle", keep=.5), Objective(threshold=5.5)], ids=str)
def test_where_the_number_is_not_known_the_weights_of_the_selected_divide(o):
    data = weighted()
    out = o(tiny_model(), collate(data))
    a = collate(data)["loss_weights"][out.selected]
    expected = (a * out.token_loss[out.selected]).sum() / a.sum()
    torch.testing.assert_close(out.loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.mle, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_weights_of_one_change_no_bit(name):
    o, teacher, ones = Objective.preset(name), FrozenTeacher(tiny_model(seed=1)), rows()
    for row in ones: row["loss_weights"] = [float(label != -100) for label in row["labels"]]
    found = []
    for data in rows(), ones:
        torch.manual_seed(0)  # of the random metric
        out = o(model := tiny_model(), collate(data), teacher=teacher)
        out.loss.backward()
        found.append((out.loss, out.mle, out.distill, flat_grad(model), o.counts(collate(data))))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("name", PRESETS)
def test_weight_zero_is_a_masked_label(name):
    o, teacher, zeros, masked = Objective.preset(name), FrozenTeacher(tiny_model(seed=1)), rows(), rows()
    for a, b in zip(zeros, masked):
        a["loss_weights"] = [float(t % 3 != 0) for t in range(len(a["labels"]))]
        b["labels"] = [label if t % 3 else -100 for t, label in enumerate(b["labels"])]
    found = []
    for data in zeros, masked:
        torch.manual_seed(0)
        out = o(model := tiny_model(), collate(data), teacher=teacher)
        out.loss.backward()
        found.append((out.loss, out.selected, flat_grad(model)))
    assert all(torch.equal(a, b) for a, b in zip(*found))


BY_SEQUENCE = [Objective(scope="sequence", distill_weight=.5), Objective.preset("mle"), Objective.preset("dft")]


@pytest.mark.parametrize("o", BY_SEQUENCE, ids=str)
def test_accumulation_changes_nothing(o):
    whole = gradient(o, weighted(), [6])
    for parts in [2, 2, 2], [1, 4, 1], [1] * 6:
        torch.testing.assert_close(gradient(o, weighted(), parts), whole, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("o", [*BY_SEQUENCE, Objective(threshold=5.5)], ids=str)
def test_a_record_of_weight_two_is_the_record_twice(o):
    heavy = rows()
    heavy[2]["loss_weights"] = [2.] * len(heavy[2]["labels"])
    torch.testing.assert_close(gradient(o, heavy, [6]), gradient(o, [*rows(), rows()[2]], [7]), atol=1e-6, rtol=1e-4)
    halves = [row | dict(loss_weights=[w / 2 for w in row.get("loss_weights", [1.] * len(row["labels"]))])
              for row in heavy]
    torch.testing.assert_close(gradient(o, halves, [6]), gradient(o, heavy, [6]), atol=1e-6, rtol=1e-4)


def test_a_packed_batch_keeps_its_weights():
    padded = collate(weighted())
    real = padded["attention_mask"].bool()
    packed = {k: padded[k][real][None] for k in ("input_ids", "labels", "loss_weights")}
    packed["position_ids"] = (real.cumsum(1) - 1)[real][None]
    for o in (Objective(), Objective(scope="sequence", keep=.4), Objective.preset("document_masked_mle", keep=.5)):
        one, other = o(tiny_model(), padded), o(tiny_model(), packed)
        torch.testing.assert_close(one.loss, other.loss, atol=1e-5, rtol=1e-5)
        assert torch.equal(one.selected[real], other.selected[0])


SPLIT = {
    "sequence": Objective(scope="sequence", distill_weight=.5), "global": Objective(scope="global", distill_weight=.5),
    "mle": Objective.preset("mle"),
    "global documents": Objective(
        granularity="document", scope="global", keep=.5, distill_weight=.5, distill_on="all"),
}


def on_two_ranks(rank, out):
    found = {}
    for name, o in SPLIT.items():
        model, batch = tiny_model(), collate(weighted()[:2] if rank else weighted()[2:])
        wrapped, total = DistributedDataParallel(model), o.counts(batch)
        dist.all_reduce(total)
        (2 * o(wrapped, batch, teacher=FrozenTeacher(tiny_model(seed=1)), num_items=total).loss).backward()
        found[name] = flat_grad(model)
    if rank == 0: torch.save(found, out)


def test_two_processes_equal_one(tmp_path):
    two_processes(on_two_ranks, tmp_path/"store", tmp_path/"out.pt")
    together = torch.load(tmp_path/"out.pt", weights_only=True)
    data = weighted()[2:] + weighted()[:2]  # in the order of the ranks
    for name, o in SPLIT.items():
        torch.testing.assert_close(together[name], gradient(o, data, [6]), atol=1e-5, rtol=1e-3,
                                   msg=lambda m: f"{name}: {m}")


# ---- from the data -------------------------------------------------------------------------------

def chat(**fields): return [dict(role="user", content="2 + 2?"), dict(role="assistant", content="4", **fields)]


def weights_of(record): return {*encode(record, tokenizer).get("loss_weights", [])}


def test_weights_of_records_turns_and_tokens_multiply():
    assert weights_of(dict(messages=chat() + chat(weight=.5), weight=4)) == {0, 4, 2}
    assert weights_of(dict(question="2 + 2?", answer="4", weight=3)) == {0, 3}
    assert weights_of(dict(messages=chat() + chat(weight=0))) == weights_of(dict(messages=chat())) == set()
    plain = encode(dict(messages=chat()), tokenizer)["labels"]
    first = next(i for i, label in enumerate(plain) if label != -100)
    tokens = [3] * len(plain)
    tokens[first] = 0
    row = encode(dict(messages=chat(weight=2), token_weights=tokens), tokenizer)
    assert row["loss_weights"] == [6 * (label != -100) for label in row["labels"]]
    assert row["labels"] == [-100 if i == first else label for i, label in enumerate(plain)]


def test_no_column_where_all_weights_are_one():
    plain, heavy = [dict(id=str(w), messages=chat(weight=w)) for w in (1, 2)]
    assert "loss_weights" not in encode_all([plain, plain], tokenizer).column_names
    both = encode_all([plain, heavy], tokenizer)
    assert [max(w) for w in both["loss_weights"]] == [1, 2] and both["labels"][0] == both["labels"][1]
    batch = collate([encode(plain, tokenizer), encode(heavy, tokenizer)])
    assert batch["loss_weights"].max(1).values.tolist() == [1, 2]


def test_weights_come_from_files_and_change_no_name(tmp_path):
    file = tmp_path/"mine.jsonl"
    raw = [dict(messages=chat(), weight=.5), dict(question="1 + 1?", answer="2", weight=2)]
    file.write_text("\n".join(map(json.dumps, raw)))
    first, second = load_records(file, "all")
    assert (first["messages"][1]["weight"], second["messages"][1]["weight"]) == (.5, 2)
    assert first["id"] == record_id(to_messages(dict(messages=chat())))
    assert to_messages(first) == first["messages"]


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_weights_are_columns_of_a_table_of_any_kind(ending, tmp_path):
    table = pd.DataFrame(dict(prompt=["1 + 1?", "2 + 2?"], completion=["2", "4"], weight=[.5, 2.], cluster=[3, 4]))
    tokens = len(encode(dict(prompt="1 + 1?", completion="2"), tokenizer)["input_ids"])
    lists = pd.Series([[3] * tokens, [1] * tokens])
    table["token_weights"] = lists if ending == "parquet" else lists.map(json.dumps)
    if ending == "csv": table.to_csv(tmp_path/"t.csv", index=False)
    elif ending == "parquet": table.to_parquet(tmp_path/"t.parquet")
    else: table.to_json(tmp_path/"t.jsonl", orient="records", lines=True)
    records = load_records(tmp_path/f"t.{ending}", "all")
    assert [record["cluster"] for record in records] == ["t/3", "t/4"]
    assert [{*row["loss_weights"]} for row in encode_all(records, tokenizer)] == [{0, 1.5}, {0, 2}]


def test_a_crop_cuts_weights_too():
    record = dict(question="2 + 2?", answer="so many words", weight=2)
    n = len(encode(record, tokenizer)["labels"])
    row = encode(record, tokenizer, n - 4, crop=True)
    assert len(row["loss_weights"]) == len(row["labels"]) == n - 4


@pytest.mark.parametrize("wrong", [-1, math.inf, "high"], ids=str)
def test_bad_weights_are_refused_in_one_line_that_names_the_record(wrong):
    tokens = len(encode(dict(messages=chat()), tokenizer)["labels"])
    for record in (dict(messages=chat(), weight=wrong), dict(messages=chat(weight=wrong)),
                   dict(messages=chat(), token_weights=[1] * (tokens - 1) + [wrong])):
        with pytest.raises(ValueError, match="record 'x7'.*weight") as e: encode(record | dict(id="x7"), tokenizer)
        assert "\n" not in str(e.value)
    row = rows()[0] | dict(id="x7")
    with pytest.raises(ValueError, match="record 'x7'.*weight"):
        collate([row | dict(loss_weights=[wrong] * len(row["labels"]))])
    with pytest.raises(ValueError, match="record 'x7'.*weight"): collate([row | dict(loss_weights=[1.])])
    with pytest.raises(ValueError, match="record 'x7'.*weight"):
        encode(dict(id="x7", messages=chat(), token_weights=[1]), tokenizer)


def test_scores_have_the_weights_where_some_differ_from_one(tmp_path):
    for name, weight in dict(plain=1, heavy=2).items():
        raw = [dict(question="1 + 1?", answer="2"), dict(question="2 + 2?", answer="4", weight=weight)]
        (tmp_path/f"{name}.jsonl").write_text("\n".join(map(json.dumps, raw)))
        assert not main(["score", f"{tmp_path}/{name}.jsonl", "--model", "tiny-llama", "--out", f"{tmp_path}/{name}"])
    plain, heavy = (pd.read_parquet(tmp_path/name/"tokens.parquet") for name in ("plain", "heavy"))
    assert heavy.groupby("record", sort=False)["weight"].agg(set).tolist() == [{1}, {2}]
    assert heavy.drop(columns="weight").equals(plain)
    shown = [(tmp_path/name/"tokens.html").read_text() for name in ("plain", "heavy")]
    assert ['"weight": {' in page for page in shown] == [False, True]
    assert ["weight 2" in heatmap_html(frame, "loss") for frame in (plain, heavy)] == [False, True]


# ---- of parts of a text --------------------------------------------------------------------------

def part(text, *weight): return dict(type="text", text=text) | dict(zip(["weight"], weight))

def said(*parts, **fields):
    "A record whose answer has these parts: texts, or pairs of text and weight."
    content = [part(one) if isinstance(one, str) else part(*one) for one in parts]
    return dict(messages=[dict(role="user", content=[part("2 + 2?")]),
                          dict(role="assistant", content=content, **fields)])


def joined(record):
    "The same record with the parts of a text in one, and without weights."
    return record | dict(messages=[
        {k: v for k, v in m.items() if k != "weight"} |
        (dict(content="".join(p["text"] for p in m["content"])) if isinstance(m["content"], list) else {})
        for m in record["messages"]])


def stretches(record, words):
    "The tokens of the responses, those of weight 0 too, as stretches of one weight."
    row, plain, out = encode(record, words), encode(joined(record), words), []
    weights = row.get("loss_weights") or [float(label != -100) for label in row["labels"]]
    assert row["input_ids"] == plain["input_ids"]
    assert row["labels"] == [label if w else -100 for label, w in zip(plain["labels"], weights)]
    for token, w in ((token, w) for token, w in zip(plain["labels"], weights) if token != -100):
        if out and out[-1][1] == w: out[-1][0].append(token)
        else: out.append(([token], w))
    return [(words.decode(tokens), w) for tokens, w in out]


def test_a_part_of_an_answer_has_its_weight():
    assert stretches(said((" Hm. ", 0), ("4", 2.), "! ", weight=.5), tokenizer) == [
        ("Hm. ", 0), ("4", 1), ("!<|im_end|>", .5)]
    row = encode(dict(text=[part("Hm. ", 0), part("4")]), tokenizer)
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "4<|im_end|>"
    assert "loss_weights" not in row
    with pytest.raises(ValueError, match="no turn of it is marked"): encode(said(("4", 0), ("!", False)), tokenizer)


def test_a_token_over_the_border_of_two_parts_is_of_the_part_in_which_it_ends():
    template, special, _ = TEMPLATES["chatml"]
    words, pieces = letters([("Ġ", "4"), (".", "Ġ")], special), letters(special=special, pieces=True)
    words.chat_template = pieces.chat_template = template
    assert stretches(said(("is ", 0), ("4", 3)), words) == [("is", 0), (" 4<|im_end|>", 3)]
    assert stretches(said(("a.", 2), (" ", 0), "b"), words) == [("a", 2), (". ", 0), ("b<|im_end|>", 1)]
    found = encode(said(("is ", 0), ("4", 3)), pieces)  # a tokenizer that puts a space before a text
    assert pieces.convert_ids_to_tokens([i for i in found["labels"] if i != -100]) == ["4", "<|im_end|>"]


SMALL = {name: tiny(template, special) for name, (template, special, _) in TEMPLATES.items()}


@pytest.mark.parametrize("name", TEMPLATES)
@given(parts=st.lists(st.text("ab .é🙂\n", max_size=4), min_size=1, max_size=5),
       weights=st.lists(st.sampled_from([0, .5, 1, 2]), min_size=5, max_size=5))
def test_parts_in_any_template(name, parts, weights):
    "Without weights the row is that of the text, with one weight that of the turn; else token by token."
    assume(text := "".join(parts).strip())
    words, plain = SMALL[name], joined(record := said(*parts))
    assert encode(record, words) == encode(plain, words)
    assert encode(said(*zip(parts, [2] * 5)), words) == encode(plain | dict(weight=2), words)
    begin = "".join(parts).index(text)
    of = [w for one, w in zip(parts, weights) for _ in one][begin:begin + len(text)]  # of each character
    turn = encode(plain | dict(weight=2), words)
    rendered, end = words.decode(turn["input_ids"]), TEMPLATES[name][2]
    at = rendered.rindex(text + ("<|return|>" if end is None else end))
    offsets = words(rendered, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    by_hand = [of[min(stop - at, len(of)) - 1] * w / 2 if w else 0
               for (_, stop), w in zip(offsets, turn["loss_weights"])]
    assume(any(by_hand))
    row = encode(said(*zip(parts, weights)), words)
    assert row.get("loss_weights", [float(label != -100) for label in row["labels"]]) == by_hand
    assert row["labels"] == [label if w else -100 for label, w in zip(turn["labels"], by_hand)]


def of_trl(name):
    "A small tokenizer with a template that TRL publishes."
    spec = find_spec("trl") or pytest.skip("TRL is an optional companion: pip install trl")
    file = Path(spec.origin).parent/"chat_templates"/f"{name}.jinja"
    return tiny(file.read_text(encoding="utf-8"), ["<think>", "</think>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"])


@pytest.mark.parametrize("name, end", [("llama3_2", "<|eot_id|>"), ("qwen2_5", "<|im_end|>"),
                                       ("gemma3", "<end_of_turn>")])
def test_parts_in_real_templates(name, end):
    found = stretches(said((" \n So. ", 0), "It is ", ("4.\n", 2)), of_trl(name))
    assert found == [("So. ", 0), ("It is ", 1), ("4." + end, 2)]


def test_reasoning_has_the_weight_of_its_turn_and_parts_that_a_template_rewrites_are_refused():
    words, thought = of_trl("qwen3"), "<think>\n2 and 2\n</think>\n\n"
    assert stretches(said(("So. ", 0), ("4.", 2), thinking="2 and 2"), words) == [
        (thought, 1), ("So. ", 0), ("4.<|im_end|>", 2)]
    assert stretches(said((thought, .5), ("4.", 2)), words) == [(thought, .5), ("4.<|im_end|>", 2)]
    with pytest.raises(ValueError, match="^record 'x7': it has weights of parts") as e:
        encode(said(("<think>2 and 2</think>", .5), ("4.", 2)) | dict(id="x7"), words)
    assert "\n" not in str(e.value)


def test_calls_have_the_weight_of_their_turn():
    words, call = of_trl("qwen2_5"), dict(name="add", arguments=dict(a=2, b=2))
    def calls(*parts):
        record = said(*parts, tool_calls=[dict(type="function", function=call)]) | dict(tools=[dict(name="add")])
        record["messages"] += [dict(role="tool", content="4"), *said("It is ", ("4", 3))["messages"][1:]]
        return record
    assert stretches(calls(("I ", 0), ("add.", 2)), words) == [
        ("I ", 0), ("add.", 2), (f"\n<tool_call>\n{json.dumps(call)}\n</tool_call><|im_end|>It is ", 1),
        ("4<|im_end|>", 3)]
    with pytest.raises(ValueError, match="weights of parts"): encode(calls(("add", 2)), words)  # which of the two?


def test_parts_of_joined_turns_keep_their_weights():
    record = said((" So. ", 0), ("4 ", 2))
    for more in said("Yes."), said(("No", 3)): record["messages"] += more["messages"][1:]
    assert stretches(record, tokenizer) == [("So. ", 0), ("4", 2), ("\n\nYes.", 1), ("\n\nNo<|im_end|>", 3)]


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_parts_are_read_from_files_of_any_kind(ending, tmp_path):
    raw = [said(("So. ", 0), "4", ("!", .5)), said("5")]
    table = pd.DataFrame(dict(messages=[record["messages"] for record in raw]))
    if ending == "csv": table.map(json.dumps).to_csv(tmp_path/"t.csv", index=False)
    elif ending == "parquet": table.to_parquet(tmp_path/"t.parquet")
    else: table.to_json(tmp_path/"t.jsonl", orient="records", lines=True)
    records = load_records(tmp_path/f"t.{ending}", "all")
    assert [encode(record, tokenizer) for record in records] == [encode(record, tokenizer) for record in raw]
    assert records[0]["id"] == record_id(to_messages(joined(raw[0])))  # weights are no part of a name
    again = Dataset.from_list([dict(messages=records[0]["messages"])])
    assert encode(again[0], tokenizer) == encode(raw[0], tokenizer)


@pytest.mark.parametrize("wrong", [-1, math.inf, "high", "NaN", [1]], ids=str)
def test_bad_weights_of_parts_are_refused_in_one_line_that_names_the_record(wrong):
    with pytest.raises(ValueError, match="record 'x7' has the weight") as e:
        encode(said("It is ", ("4", wrong)) | dict(id="x7"), tokenizer)
    assert "\n" not in str(e.value)
    plain = joined(said("It is 4"))
    for given in wrong, [wrong], [dict(end=7, weight=wrong)], [dict(end=6, weight=0)], [dict(end=-1, weight=0)] * 2:
        plain["messages"][1]["content_weights"] = given
        with pytest.raises(ValueError, match="record 'x7' has (the weight|content_weights)") as e:
            encode(plain | dict(id="x7"), tokenizer)
        assert "\n" not in str(e.value)


# ---- in the Trainers -----------------------------------------------------------------------------

def arguments(folder, **changes):
    return dict(output_dir=str(folder), max_steps=1, optim="sgd", learning_rate=1., lr_scheduler_type="constant",
                max_grad_norm=0, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
                use_cpu=True) | changes


def change(trainer):
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    trainer.train()
    return before - torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("size, accumulation", [(6, 1), (2, 3)])
def test_the_trainer_takes_them(size, accumulation, tmp_path):
    o, teacher = BY_SEQUENCE[0], FrozenTeacher(tiny_model(seed=1))
    args = TrainingArguments(**arguments(tmp_path, per_device_train_batch_size=size,
                                         gradient_accumulation_steps=accumulation))
    trainer = InOrder(tiny_model(), args, o, teacher, train_dataset=weighted(), processing_class=tokenizer)
    torch.testing.assert_close(change(trainer), gradient(o, weighted(), [6]), atol=1e-5, rtol=1e-3)
    log = next(r for r in trainer.state.log_history if "mle" in r)
    out, a = o(tiny_model(), collate(weighted()), teacher=teacher), collate(weighted())["loss_weights"]
    mean = lambda x, on: ((a * x)[on].sum() / a[on].sum()).item()
    assert log["mle"] == pytest.approx(mean(out.token_loss, out.selected), rel=1e-4)
    assert log["mle"] == pytest.approx(out.mle.item(), rel=1e-4)


def test_an_evaluation_counts_each_token_once(tmp_path):
    args = TrainingArguments(**arguments(tmp_path, per_device_eval_batch_size=4))
    trainer = InOrder(tiny_model(), args, train_dataset=rows(), processing_class=tokenizer)
    halves = [row | dict(loss_weights=[.5 * (i + 1)] * len(row["labels"])) for i, row in enumerate(rows())]
    assert trainer.evaluate(halves)["eval_loss"] == pytest.approx(trainer.evaluate(rows())["eval_loss"], rel=1e-6)


def test_trl_takes_them_with_our_collator_and_refuses_to_lose_them(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is an optional companion: pip install trl")
    from uat_repro.sft import UncertaintyAwareSFTTrainer
    data = Dataset.from_list(weighted())
    def trainer(collator=None, rows=data, **changes):
        args = trl.SFTConfig(**arguments(tmp_path, per_device_train_batch_size=6, bf16=False, **changes))
        return UncertaintyAwareSFTTrainer(tiny_model(), args, "mle", train_dataset=rows, processing_class=tokenizer,
                                          data_collator=collator)
    expected = gradient(Objective.preset("mle"), weighted(), [6])
    torch.testing.assert_close(change(trainer(collate)), expected, atol=1e-5, rtol=1e-3)
    raw = [dict(messages=chat(), weight=2.), dict(messages=chat(), token_weights=[2.]), dict(messages=chat(weight=2.)),
           said(("4", 2.)), dict(messages=to_messages(said(("4", 2.))))]
    for attempt in (lambda: trainer(), lambda: trainer(collate, packing=True, max_length=64),
                    *(lambda record=record: trainer(rows=Dataset.from_list([record])) for record in raw)):
        with pytest.raises(ValueError, match="TRL does not read weights"): attempt()
    stream = IterableDataset.from_generator(lambda: iter([dict(messages=chat(weight=2.))]))  # of columns that nobody has named
    with pytest.raises(ValueError, match="TRL does not read weights"): trainer(rows=stream, max_steps=1)
    with pytest.raises(ValueError, match="data_collator drops them"):
        trainer(DataCollatorWithFlattening()).train()


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
@pytest.mark.parametrize("o", [Objective(), *BY_SEQUENCE, Objective.preset("document_masked_mle", keep=.5)], ids=str)
def test_what_trl_packs_has_the_gradient_of_padded_rows(o, strategy):
    "No document is longer than a row, so none is cut."
    trl = pytest.importorskip("trl", reason="TRL is an optional companion: pip install trl")
    data = Dataset.from_list(weighted()).select_columns(["input_ids", "labels", "loss_weights"])
    packed = trl.pack_dataset(data, 80, strategy)
    assert 1 < len(packed) < len(data)
    torch.testing.assert_close(gradient(o, packed, [len(packed)]), gradient(o, weighted(), [6]), atol=1e-6, rtol=1e-4)
    if o in BY_SEQUENCE:  # no document competes with another, so it does not matter which row is in which micro-batch
        torch.testing.assert_close(gradient(o, packed, [1] * len(packed)), gradient(o, weighted(), [6]),
                                   atol=1e-6, rtol=1e-4)


def test_both_trainers_take_packed_rows_with_weights(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is an optional companion: pip install trl")
    from uat_repro.sft import UncertaintyAwareSFTTrainer
    packed = trl.pack_dataset(Dataset.from_list(weighted()).select_columns(["input_ids", "labels", "loss_weights"]), 80)
    for kind, config in ((UncertaintyAwareTrainer, TrainingArguments), (UncertaintyAwareSFTTrainer, trl.SFTConfig)):
        args = config(**arguments(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=1, bf16=False))
        trainer = kind(tiny_model(), args, "mle", train_dataset=packed, processing_class=tokenizer,
                       data_collator=collate)
        torch.testing.assert_close(change(trainer), gradient(Objective.preset("mle"), weighted(), [6]),
                                   atol=1e-5, rtol=1e-3)
