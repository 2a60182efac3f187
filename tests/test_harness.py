"""lm-evaluation-harness on local records: the files of a data folder, what is left out, and what comes back."""
import json, random
from pathlib import Path

import numpy as np, pytest, torch
from conftest import REAL_DATA
from transformers import PreTrainedModel

from uat_repro import evaluation
from uat_repro.evaluation import NEED_PUNKT, benchmark
from uat_repro.models import tiny_model, tiny_tokenizer
from uat_repro.tokens import TEMPLATE_DATE

for package in ("lm_eval", "langdetect", "immutabledict"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'uat_repro[benchmarks]'")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "Three prompts of IFEval's kind: any text without a comma obeys the first, none the second; one counts sentences."
    monkeypatch.setattr(evaluation, "_has_punkt", lambda: False)
    rows = [dict(key=1, prompt="No commas, please.", instruction_id_list=["punctuation:no_comma"], kwargs=[{}]),
            dict(key=2, prompt="Say nothing, then end with Amen.", kwargs=[dict(end_phrase="Amen."), {}],
                 instruction_id_list=["startend:end_checker", "punctuation:no_comma"]),
            dict(key=3, prompt="Three sentences.", kwargs=[dict(relation="at least", num_sentences=3)],
                 instruction_id_list=[NEED_PUNKT[0]])]
    (tmp_path / "ifeval.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def test_prompts_that_cannot_be_judged_are_left_out_and_counted(folder):
    samples, left_out = benchmark(tiny_model(), tiny_tokenizer(), ["ifeval"], folder, max_new_tokens=2)
    assert left_out == {"ifeval": 1} and set(samples["record"]) == {"ifeval/0", "ifeval/1"}
    value = samples.set_index(["record", "metric"])["value"]
    said = samples.set_index(["record", "metric"])["response"]["ifeval/0", "prompt_level_strict_acc"]
    assert value["ifeval/0", "prompt_level_strict_acc"] == float("," not in said and said.strip() != "")
    assert value["ifeval/1", "prompt_level_strict_acc"] == 0 and 0 <= value["ifeval/1", "inst_level_strict_acc"] <= .5


def test_a_line_ends_where_json_says_so(tmp_path):
    "Other marks of a line may stand in a text."
    rows = [dict(question=f"{i}\u2028{i}\u0085{i}?", answer=f"#### {i}") for i in range(3)]
    for name in "train", "test":
        (tmp_path / f"gsm8k_{name}.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    samples, _ = benchmark(tiny_model(), tiny_tokenizer(), ["gsm8k"], tmp_path, max_new_tokens=2)
    assert samples["record"].nunique() == 3


@pytest.mark.parametrize("device, dtype", [("cpu", None), ("cuda", torch.bfloat16)])
def test_benchmarks_compute_in_bfloat16_on_a_gpu_alone(device, dtype, monkeypatch):
    "As the plan counts them, and with the same answers on every CPU."
    given = []
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM", lambda **asked: given.append(asked["mixed_precision_dtype"]))
    monkeypatch.setattr(evaluation, "_run_harness", lambda network, tasks, folder, **more: {})
    monkeypatch.setattr(evaluation, "use_bf16", lambda: True)
    monkeypatch.setattr(PreTrainedModel, "device", torch.device(device))
    benchmark(tiny_model(), tiny_tokenizer(), ["gsm8k"])
    assert given == [dtype]


def test_prompts_of_benchmarks_have_the_fixed_date(monkeypatch):
    tokenizer, seen = tiny_tokenizer(), []
    tokenizer.chat_template = "{{ date_string }}, {{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    def harness(network, *args, **kwargs):
        seen.append(network.apply_chat_template([dict(role="user", content="Q")]))
        return {}
    monkeypatch.setattr(evaluation, "_run_harness", harness)
    benchmark(tiny_model(), tokenizer, ["gsm8k"])
    assert seen == [f"{TEMPLATE_DATE}, {TEMPLATE_DATE}: Q"]


def test_a_benchmark_leaves_the_model_and_random_numbers_as_they_are(tmp_path):
    (tmp_path / "gsm8k_train.jsonl").write_text(row := json.dumps(dict(question="2 + 2?", answer="#### 4")) + "\n")
    (tmp_path / "gsm8k_test.jsonl").write_text(row)
    model, drawn = tiny_model().train(), []
    for seed in 1, 2:
        random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
        benchmark(model, tiny_tokenizer(), ["gsm8k"], tmp_path, max_new_tokens=2)
        drawn.append((random.random(), np.random.random(), torch.rand(()).item()))
    assert all(a != b for a, b in zip(*drawn, strict=True)) and all(m.training for m in model.modules())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install 'uat_repro\\[benchmarks\\]'"):
        benchmark(tiny_model(), tiny_tokenizer())


def test_sixty_four_prompts_of_the_real_ifeval_need_punkt(tmp_path, monkeypatch):
    source = Path(REAL_DATA) / "ifeval.jsonl"
    if not source.exists(): pytest.skip("needs ifeval.jsonl in UAT_REPRO_DATA_DIR")
    monkeypatch.setattr(evaluation, "_has_punkt", lambda: False)
    assert evaluation._usable("ifeval", source, tmp_path / "usable.jsonl") == 64
    assert len((tmp_path / "usable.jsonl").read_text().splitlines()) == 541 - 64
