"""Families, wrappers and weights: what is wrong is refused, and what is tried once changes nothing."""
import ast, multiprocessing, os, signal, time
from pathlib import Path

import pytest, torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from uat_repro import _weights, models
from uat_repro._documents import by_document, packed_beside_mask
from uat_repro.distillation import AdapterTeacher
from uat_repro.models import FAMILIES, Family, head_of, hidden_states, tiny_model, tiny_tokenizer, unwrap
from uat_repro.objective import Objective
from uat_repro.uncertainty import MCDropout

SIZES = dict(vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
             head_dim=8)
MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
WINDOW = dict(sliding_window=4)
CASES = [("falcon_h1", dict(lm_head_multiplier=.02, **MAMBA)), ("llama4_text", {}), ("nemotron", {}),
         ("recurrent_gemma", dict(lru_width=32, block_types=["recurrent", "attention"], logits_soft_cap=3.)),
         ("doge", WINDOW), ("phimoe", WINDOW), ("mistral", WINDOW), ("llama", {}), ("gpt2", {}), ("mixtral", {}),
         ("cohere", dict(logit_scale=.25)), ("granite", dict(logits_scaling=4.))]


def small(family, attention=None, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **more})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for p in model.parameters():
        if p.dim() == 2: nn.init.normal_(p, std=.2)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family,more", CASES, ids=[name for name, _ in CASES])
def test_states_and_head_are_the_models_own_logits(family, more, attention):
    "Padded and packed, in families that scale, cap, window by mask, run a state on or take no more arguments."
    try: model = small(family, attention, **more)
    except ValueError: pytest.skip(f"{family} has no {attention} attention")
    lengths = [5, 17, 11]
    ids = [torch.randint(3, 120, (n,)) for n in lengths]
    pad = lambda rows: nn.utils.rnn.pad_sequence(rows, batch_first=True)
    padded = dict(input_ids=pad(ids), attention_mask=pad([torch.ones(n).long() for n in lengths]))
    packed = dict(input_ids=torch.cat(ids)[None], position_ids=torch.cat([torch.arange(n) for n in lengths])[None])
    with torch.no_grad():
        want = torch.cat([model(input_ids=i[None]).logits[0] for i in ids])
        for batch in (padded, packed):
            states = hidden_states(model, batch)
            ours = head_of(model).logits(states[batch["attention_mask"].bool()] if batch is padded else states[0])
            torch.testing.assert_close(ours, want, atol=1e-4, rtol=1e-4)


def test_unknown_transformation_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(FAMILIES, "recurrent_gemma", Family())
    monkeypatch.setattr(models, "_FOUND", {})
    model = small("recurrent_gemma", lru_width=32, block_types=["recurrent", "attention"], logits_soft_cap=3.)
    with pytest.raises(ValueError, match="recurrent_gemma: hidden states and head do not give .* models.FAMILIES"):
        head_of(model)


def test_a_family_that_is_named_after_a_failure_is_tried(monkeypatch):
    known = FAMILIES["recurrent_gemma"]
    monkeypatch.setitem(FAMILIES, "recurrent_gemma", Family())
    monkeypatch.setattr(models, "_FOUND", {})
    model = small("recurrent_gemma", lru_width=32, block_types=["recurrent", "attention"], logits_soft_cap=3.)
    with pytest.raises(ValueError, match="models.FAMILIES"): head_of(model)
    monkeypatch.setitem(FAMILIES, "recurrent_gemma", known)
    assert head_of(model).softcap == 3
    monkeypatch.setitem(FAMILIES, "recurrent_gemma", Family())
    with pytest.raises(ValueError, match="models.FAMILIES"): head_of(model)


def test_weights_that_are_no_numbers_are_named_and_do_not_condemn_their_family(monkeypatch):
    monkeypatch.setattr(models, "_FOUND", {})
    model = tiny_model()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="states are not finite: its weights are damaged, or overflow in torch.float32"):
        head_of(model)
    assert head_of(tiny_model()).softcap is None


@pytest.mark.parametrize("family", ["bert", "electra", "modernbert-decoder"])
def test_an_output_layer_with_more_than_a_matrix_is_refused(family):
    with pytest.raises(ValueError, match=f"{family}: .* choose another family"): head_of(small(family, is_decoder=True))


def test_a_trial_leaves_no_trace_and_is_made_once(monkeypatch):
    monkeypatch.setattr(models, "_FOUND", {})
    model = tiny_model().train()
    calls, before = [], torch.get_rng_state()
    hook = model.get_decoder().register_forward_hook(lambda *args: calls.append(1))
    head_of(model)
    first = len(calls)
    head_of(model); head_of(tiny_model(seed=1))
    hook.remove()
    assert first == len(calls) == 1 and len(models._FOUND) == 1
    assert torch.equal(torch.get_rng_state(), before) and all(m.training for m in model.modules())


def test_unwrap_changes_no_wrapper():
    model = tiny_model()
    wrapped = nn.DataParallel(model)
    compiled = torch.compile(wrapped, backend="eager")
    assert unwrap(compiled) is model and compiled._orig_mod is wrapped and wrapped.module is model


def test_a_compiled_model_is_called_compiled():
    model, calls = tiny_model(), []
    def backend(graph, inputs): calls.append(1); return graph.forward
    batch = dict(input_ids=torch.arange(10).view(2, 5), attention_mask=torch.tensor([[1] * 5, [1] * 3 + [0] * 2]))
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            ours, theirs = (hidden_states(m, batch)[batch["attention_mask"].bool()] for m in (compiled, model))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert calls


def _convert_slowly(path, folder):
    tiny_model().save_pretrained(folder)
    (folder/"begun").touch()
    time.sleep(.5)
    tiny_tokenizer().save_pretrained(folder)


def _load(path, cache, converted):
    os.environ["UAT_REPRO_CACHE"] = cache
    def convert(path, folder):
        converted.put(1)
        _convert_slowly(path, folder)
    _weights._convert, _weights._needs = convert, lambda *args: None
    _weights.load_model(path)


def test_a_killed_conversion_and_two_at_once(tmp_path):
    gguf = tmp_path/"small.gguf"
    gguf.write_bytes(b"any content")
    start = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    converted = start.Queue()
    process = lambda: start.Process(target=_load, args=(str(gguf), str(tmp_path/"cache"), converted))
    killed = process(); killed.start()
    for _ in range(1200):
        if begun := list(tmp_path.glob("cache/*/begun")): break
        time.sleep(.05)
    assert begun
    os.kill(killed.pid, signal.SIGKILL); killed.join()
    both = [process(), process()]
    for p in both: p.start()
    for p in both: p.join(120)
    assert [p.exitcode for p in both] == [0, 0]
    assert sum(converted.get(timeout=5) for _ in range(2)) == 2  # the killed one, and one of the two
    assert converted.empty()
    assert not list(tmp_path.glob("cache/*.part"))


def test_weights_import_nothing_of_the_library():
    "They are a part of `models`, which nothing of the library stands below; and neither file is long."
    text = Path(_weights.__file__).read_text(encoding="utf-8")
    assert not [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.level]
    assert len(text.splitlines()) <= 350


def test_an_output_layer_that_is_not_here_is_refused():
    model = tiny_model("tiny-phi3")  # as ZeRO-3 and FSDP1 leave it
    for gone in torch.empty(0), torch.empty(8):
        model.lm_head.weight = nn.Parameter(gone)
        with pytest.raises(ValueError, match="FSDP1 and ZeRO-3 are not supported"): head_of(model)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2"])
def test_documents_share_a_row_where_that_is_faster(name, device, monkeypatch):
    "On the CPU. On a GPU without flash attention they are padded."
    model, rows = tiny_model(name), set()
    texts = ["Short.", "A document that is a good deal longer than a window of sixteen.", "Of middling length, say."]
    padded = tiny_tokenizer()(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    real = padded["attention_mask"].bool()
    packed = dict(input_ids=padded["input_ids"][real][None], position_ids=(real.cumsum(1) - 1)[real][None])
    alone = torch.cat([hidden_states(model, dict(input_ids=ids[mask][None]))[0]
                       for ids, mask in zip(padded["input_ids"], real)])
    monkeypatch.setattr(PreTrainedModel, "device", torch.device(device))
    models._takes_documents(model.get_decoder())  # tried before rows are counted
    model.model.layers[0].register_forward_pre_hook(lambda module, args: rows.add(len(args[0])))
    for states in (hidden_states(model, padded)[real], hidden_states(model, packed)[0]):
        torch.testing.assert_close(states, alone, atol=1e-5, rtol=1e-4)
    assert rows == {dict(cpu=1, cuda=3)[device]}


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_flash_attention_is_taken_for_documents_on_a_gpu(attention, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "device", torch.device("cuda"))
    monkeypatch.setattr(models, "_once", lambda trial, model: True)
    decoder = tiny_model().get_decoder()
    decoder.config._attn_implementation = attention
    assert models._takes_documents(decoder)
    with by_document(decoder, torch.tensor([[0, 1, 0]])) as more: assert more == {}


@pytest.mark.parametrize("family, more", [("granite", dict(embedding_multiplier=12.)), ("nanochat", {})])
def test_a_decoder_that_changes_what_enters_its_first_layer_is_not_cut(family, more):
    with pytest.raises(ValueError, match=f"{family} cannot be cut: trunk and top together end in other states"):
        models.split_layers(small(family, **more), 1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "cohere", "granite", "llama4_text", "qwen3_next", "qwen3_5_text",
                                    "olmo_hybrid", "jetmoe", "falcon_h1"])  # from Llama 4 on: layers of several kinds
def test_other_decoders_are_cut(family):
    model, ids = small(family), torch.arange(3, 20)[None]
    trunk, top = models.split_layers(model, 1)
    parts = hidden_states(top, dict(inputs_embeds=hidden_states(trunk, dict(input_ids=ids))))
    torch.testing.assert_close(parts, hidden_states(model, dict(input_ids=ids)))


def test_settings_of_dropout_that_no_module_reads_are_none():
    "Attention has read its own when the model was built; Phi-3 has a field for embeddings that nothing reads."
    model, ids = models.tiny_model("tiny-phi3").train(), torch.arange(3, 20)[None]
    model.config.attention_dropout = model.config.embd_pdrop = .5
    assert not models.has_dropout(model) and torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_that_trains_biases_is_no_teacher(bias):
    lora = get_peft_model(small("qwen2"), LoraConfig(target_modules=["q_proj"], bias=bias, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="parameters outside the adapter are trained"): AdapterTeacher(lora)


def test_a_teacher_leaves_frozen_what_its_user_has_frozen():
    lora = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, p in lora.named_parameters():
        if "lora_A" in name: p.requires_grad_(False)
    trained = [name for name, p in lora.named_parameters() if p.requires_grad]
    AdapterTeacher(lora)(dict(input_ids=torch.arange(5)[None]))
    assert trained and [name for name, p in lora.named_parameters() if p.requires_grad] == trained


def test_dropout_of_upper_layers_does_not_leave_a_learnt_prompt_out():
    from peft import PromptTuningConfig
    prompted = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batch = dict(input_ids=torch.arange(5)[None], labels=torch.arange(5)[None])
    with pytest.raises(ValueError, match="acts outside of the layers .*: leave from_layer at 0"):
        MCDropout(samples=4, from_layer=1)(prompted, batch)


@pytest.mark.parametrize("family, names", [("opt", ("dropout",)), ("biogpt", ("hidden_dropout_prob", "activation_dropout")),
                                           ("phimoe", ("input_jitter_noise", "router_jitter_noise"))])
def test_dropout_without_a_module_of_its_own_is_found(family, names):
    off = dict(dropout=0., attention_dropout=0., activation_dropout=0., hidden_dropout_prob=0., layerdrop=0.,
               attention_probs_dropout_prob=0., input_jitter_noise=0., router_jitter_noise=0., word_embed_proj_dim=32)
    assert not models.has_dropout(small(family, **off))
    for name in names: assert models.has_dropout(small(family, **{**off, name: .1}))


def in_two_documents(model):
    "The logits of two documents in padded rows, in a packed one, and of the model's own forward of each."
    a, b = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10, 11]])
    padded = dict(input_ids=torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]]), attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
    packed = dict(input_ids=torch.cat([a, b], 1), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    with torch.no_grad():
        rows, row = (head_of(model).logits(hidden_states(model, batch)) for batch in (padded, packed))
        return torch.cat([rows[0, :3], rows[1]]), row[0], torch.cat([model(input_ids=x).logits[0, -x.shape[1]:] for x in (a, b)])


@pytest.mark.parametrize("kind, more", [
    ("PromptTuningConfig", dict(num_virtual_tokens=2)), ("PrefixTuningConfig", dict(num_virtual_tokens=2)),
    ("PromptEncoderConfig", dict(num_virtual_tokens=2, encoder_hidden_size=16)),
    ("LoraConfig", dict(target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[6]))])
def test_adapters_that_pefts_own_forward_applies(kind, more):
    "A prompt goes before each document, and aLoRA begins behind the tokens that it waits for."
    import peft
    model = peft.get_peft_model(tiny_model(), getattr(peft, kind)(task_type="CAUSAL_LM", **more)).eval()
    for p in (p for p in model.parameters() if p.requires_grad): nn.init.normal_(p, std=.5)
    padded, packed, expected = in_two_documents(model)
    torch.testing.assert_close(padded, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed, expected, atol=1e-4, rtol=1e-4)
    assert (expected - in_two_documents(tiny_model().eval())[2]).abs().max() > .1, "the adapter does something"


def test_noise_of_neftune_is_that_of_the_models_own_rows_and_does_not_choose():
    from transformers.integrations.neftune import activate_neftune
    model, seen = tiny_model().train(), []
    activate_neftune(model, 5)
    model.get_input_embeddings().register_forward_hook(lambda m, ids, out: seen.append((out - m.weight[ids[0]]).abs().max().item()))
    for rows in (2, 16):
        ids = torch.randint(3, 60, (rows, 12))
        mask = (torch.arange(12) < torch.tensor([12] + [9] * (rows - 1))[:, None]).long()
        hidden_states(model, dict(input_ids=ids, attention_mask=mask))
        assert seen[-1] == pytest.approx(5 / (12 * model.config.hidden_size)**.5, rel=.01)
    batch = dict(input_ids=ids, attention_mask=mask, labels=ids)
    first, second = (Objective()(model, batch) for _ in range(2))
    assert models.has_dropout(model) and torch.equal(first.selected, second.selected) and first.loss != second.loss


def test_pictures_and_encoders_are_refused():
    with pytest.raises(ValueError, match="the batch has pixel_values, and only text is read"):
        hidden_states(tiny_model(), dict(input_ids=torch.tensor([[5, 6]]), pixel_values=torch.zeros(1, 3, 2, 2)))
    from transformers import AutoModelForSeq2SeqLM, BartConfig
    bart = AutoModelForSeq2SeqLM.from_config(BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16))
    with pytest.raises(ValueError, match="no causal language model"): hidden_states(bart, dict(input_ids=torch.tensor([[5, 6]])))


def test_quantised_layers_are_tried_and_a_quantised_output_layer_is_refused():
    "bitsandbytes has parameters of its own class; this one is a stand-in."
    class Packed(nn.Parameter): pass
    def with_packed(model):
        layer = model.get_decoder().layers[0].mlp.up_proj
        layer.weight = Packed(layer.weight.data)
        return model
    assert type(with_packed(small("llama", rope_theta=20000.)).get_decoder().layers[0].mlp.up_proj.weight) is Packed
    assert head_of(with_packed(small("llama", rope_theta=20000.)))
    scaled = with_packed(small("llama", rope_theta=30000.))
    scaled.lm_head.register_forward_hook(lambda module, args, out: 3 * out)
    with pytest.raises(ValueError, match="do not give the model's own logits"): head_of(scaled)
    model = small("llama", tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised or offloaded"): head_of(model)


def test_packed_documents_stay_apart_beside_a_mask_of_ones():
    model, ids = tiny_model(), torch.arange(10, 35)[None]
    row = dict(input_ids=ids, position_ids=torch.cat([torch.arange(10), torch.arange(15)])[None])
    masked = hidden_states(model, dict(row, attention_mask=torch.ones_like(ids)))
    torch.testing.assert_close(masked, hidden_states(model, row))
    padded = dict(attention_mask=(torch.arange(25) > 3).long()[None], position_ids=(torch.arange(25) - 4).clamp(0)[None])
    assert not packed_beside_mask(padded)
