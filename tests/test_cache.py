"""A cache of hidden states never gives those of something else."""
import json, subprocess, sys

import pytest, torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode

from uat_repro import cache
from uat_repro.cache import PART, HiddenCache, compute_states
from uat_repro.models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*computed again")
ROWS = [dict(id=str(i), input_ids=[3 + (i + j) % 200 for j in range(3 + 5 * i % 17)]) for i in range(23)]


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(cache, "PART_TOKENS", 40)
    monkeypatch.setattr(cache, "PART_RECORDS", 4)


def right(found, model):
    "Whether every record has its own states."
    want = compute_states(model, ROWS)
    return all(torch.allclose(found[i], want[i], atol=1e-4) for i in range(len(ROWS)))


@pytest.mark.parametrize("first,second", [(1, 16), (16, 1), (4, 7), (7, 4)])
def test_any_batch_size_completes_a_cache(tmp_path, first, second):
    model = tiny_model()
    HiddenCache.build(model, ROWS, tmp_path, batch_size=first)
    (tmp_path/PART.format(1)).unlink()
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("states-*")}
    assert len(kept) > 2 and right(HiddenCache.build(model, ROWS, tmp_path, batch_size=second), model)
    assert kept == {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("states-*") if p.name in kept}


def test_others_of_the_group_can_read_and_a_whole_cache_is_not_written_again(tmp_path):
    HiddenCache.build(tiny_model(), ROWS, tmp_path)
    modes = {p.name: p.stat().st_mode for p in tmp_path.iterdir()}
    assert set(modes.values()) == {(tmp_path/"index.json").stat().st_mode}
    before = (tmp_path/"index.json").stat().st_mtime_ns
    HiddenCache.build(tiny_model(), ROWS, tmp_path)
    assert (tmp_path/"index.json").stat().st_mtime_ns == before


def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    HiddenCache.build(tiny_model(), ROWS, tmp_path)
    def refuse(*args, **more): raise PermissionError(13, "Permission denied", str(args[0]))
    monkeypatch.setattr(cache, "safe_open", refuse)
    with pytest.raises(PermissionError): HiddenCache(tmp_path)


BUILD = """
import sys
from uat_repro import cache
from uat_repro.models import tiny_model
cache.PART_TOKENS = cache.PART_RECORDS = 4
cache.HiddenCache.build(tiny_model(), [dict(input_ids=list(range(3, 8 + i))) for i in range(40)], sys.argv[1])
"""

def test_two_processes_build_one_cache(tmp_path):
    both = [subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path)], stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(HiddenCache(tmp_path)) == 40 and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("index", [None, "", "{", "[]", "{}"])
def test_without_an_index_old_files_are_not_taken(tmp_path, index):
    HiddenCache.build(tiny_model(seed=1), ROWS, tmp_path)
    (tmp_path/"index.json").unlink()
    if index is not None: (tmp_path/"index.json").write_text(index)
    with pytest.raises((ValueError, FileNotFoundError), match="HiddenCache.build"): HiddenCache(tmp_path)
    assert right(HiddenCache.build(tiny_model(), ROWS, tmp_path), tiny_model())


def test_an_index_of_other_weights_does_not_adopt_files(tmp_path):
    "The index of one model over the files of another, as a copied file leaves it."
    for seed in (0, 1): HiddenCache.build(tiny_model(seed=seed), ROWS, tmp_path/str(seed))
    (tmp_path/"1"/"index.json").write_text((tmp_path/"0"/"index.json").read_text())
    with pytest.raises(ValueError, match="holds other states"): HiddenCache(tmp_path/"1")
    assert right(HiddenCache.build(tiny_model(), ROWS, tmp_path/"1"), tiny_model())


def test_another_division_into_files_does_not_keep_them(tmp_path, monkeypatch):
    "As it was when the division followed the batch size."
    HiddenCache.build(tiny_model(), ROWS, tmp_path)
    monkeypatch.setattr(cache, "PART_RECORDS", 3)
    assert right(HiddenCache.build(tiny_model(), ROWS, tmp_path), tiny_model())


def _cut(file): file.write_bytes(file.read_bytes()[:-8])
def _flip(file): file.write_bytes((whole := file.read_bytes())[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
def _empty(file): file.write_bytes(b"")
def _without_label(file): save_file(load_file(file), file)
def _short(file): save_file(dict(states=load_file(file)["states"][:-1].clone()), file, dict(identity="x"))


@pytest.mark.parametrize("damage", [_cut, _flip, _empty, _without_label, _short])
def test_a_damaged_file_is_named_and_made_again(tmp_path, damage):
    model = tiny_model()
    HiddenCache.build(model, ROWS, tmp_path)
    damage(tmp_path/PART.format(2))
    with pytest.raises(ValueError, match=r"1 of \d+ files: states-00002.*call HiddenCache.build again"):
        HiddenCache(tmp_path)
    with pytest.warns(UserWarning, match="states-00002.* computed again"):
        found = HiddenCache.build(model, ROWS, tmp_path)
    assert right(found, model)


def test_a_file_says_what_it_is(tmp_path):
    from safetensors import safe_open
    built = HiddenCache.build(tiny_model(), ROWS, tmp_path)
    lengths = json.loads((tmp_path/"index.json").read_text())["lengths"]
    with safe_open(tmp_path/PART.format(0), "pt") as f: label = json.loads(f.metadata()["label"])
    assert label["identity"] == built.key and 40 <= int(label["rows"]) < sum(lengths)


def padded(rows, device="cpu"):
    ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows], batch_first=True)
    return dict(input_ids=ids.to(device), attention_mask=mask.to(device))


class PretendedGpu(TorchFunctionMode):
    "Tensors say that they are on a GPU; which are pinned, and which copies the program waits for, is written down."
    def __init__(self):
        super().__init__()
        self.pinned, self.waits = set(), {}  # addresses of tensors

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.is_cuda.__get__: return True
        pinned = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        if pinned: self.pinned.add(result.data_ptr())
        if func is torch.Tensor.to: self.waits[args[0].data_ptr()] = not kwargs.get("non_blocking", False)
        return result


def test_states_leave_for_a_gpu_from_pinned_memory_and_nobody_waits(tmp_path):
    found = HiddenCache.build(tiny_model(), ROWS, tmp_path)
    with PretendedGpu() as gpu: states = found.states_of(padded(ROWS))
    assert gpu.pinned == {states.data_ptr()} and gpu.waits[states.data_ptr()] is False
    assert torch.equal(states, found.states_of(padded(ROWS)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_states_arrive_on_a_gpu_as_they_are(tmp_path):
    found = HiddenCache.build(tiny_model(), ROWS, tmp_path)
    states = found.states_of(padded(ROWS, "cuda"))
    assert states.is_cuda and torch.equal(states.cpu(), found.states_of(padded(ROWS)))


@pytest.mark.parametrize("row", [dict(seq_lengths=[2, 3]), dict(attention_mask=[0, 1, 1, 1, 1])])
def test_rows_of_several_documents_or_with_padding_are_refused(row, tmp_path):
    with pytest.raises(ValueError, match="build the cache from rows of one document each"):
        HiddenCache.build(tiny_model(), [dict(input_ids=[5, 6, 7, 8, 9]) | row], tmp_path)


def test_a_buffer_that_is_saved_with_the_weights_belongs_to_the_model():
    model, plain = tiny_model(), cache.weights_hash(tiny_model())
    model.register_buffer("idle", torch.zeros(3), persistent=False)
    assert cache.weights_hash(model) == plain
    model.register_buffer("bias_of_experts", torch.zeros(3))
    before = cache.weights_hash(model)
    model.bias_of_experts[1] = 1
    assert plain != before != cache.weights_hash(model)


def test_an_adapter_without_scaling_is_on_or_off():
    from peft import IA3Config, get_peft_model
    modules = dict(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(tiny_model(), IA3Config(task_type="CAUSAL_LM", **modules))
    adapted = cache.cache_identity(model, ROWS, -1)
    with model.disable_adapter(): assert cache.cache_identity(model, ROWS, -1)["config"] != adapted["config"]
