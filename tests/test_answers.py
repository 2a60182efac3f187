"""A trained top joined to its trunk; answers and how they are read; a model that was taught to answer."""
import re

import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM

from uat_repro.answers import exact_match, final_answer, join_layers
from uat_repro.cache import CachedDataset, HiddenCache
from uat_repro.models import hidden_states, split_layers, tiny_model, tiny_tokenizer
from uat_repro.tokens import encode_all
from uat_repro.training import train_in_memory

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=6, pad_token_id=0,
             bos_token_id=1, eos_token_id=2)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "smollm3",
            "olmo2", "qwen3_next", "qwen3_5_text", "llama4_text"]


def build(family, tied):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_joined_is_the_whole_bit_for_bit(family, tied, tmp_path):
    "For padded and ragged batches, in generation, and after it was saved; windows are shorter than the documents."
    whole = build(family, tied)
    torch.manual_seed(1)
    ids, ones = torch.randint(3, 64, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    left, right = ones.clone(), ones.clone()
    left[0, :5], right[0, -5:] = 0, 0
    for layer in (1, 3):
        joined = join_layers(*split_layers(whole, layer)).eval()
        assert torch.equal(joined(ids, left).logits, whole(ids, left).logits)
        batch = dict(input_ids=ids, attention_mask=right)
        assert torch.equal(hidden_states(joined, batch), hidden_states(whole, batch))
        how = dict(max_new_tokens=10, do_sample=False, attention_mask=left)
        assert torch.equal(joined.generate(ids, **how), whole.generate(ids, **how))
        assert joined.config.to_dict() == whole.config.to_dict()
    joined.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, whole(ids).logits)


@torch.no_grad()
def test_a_head_that_was_trained_leaves_the_embeddings_of_the_trunk_alone(tmp_path):
    whole = build("llama", tied=True)
    ids = torch.randint(3, 64, (1, 9))
    trunk, top = split_layers(build("llama", tied=True), 2)[0], split_layers(whole, 2)[1]
    top.get_output_embeddings().weight.mul_(1.5)  # also the embeddings of the model that it was cut from
    joined = join_layers(trunk, top).eval()
    expected = top(inputs_embeds=trunk(ids, use_cache=False).last_hidden_state).logits
    assert torch.equal(joined(ids).logits, expected) and not torch.equal(whole(ids).logits, expected)
    joined.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)


def test_a_family_that_cannot_be_cut_says_so():
    with pytest.raises(ValueError, match="add an entry to models.FAMILIES"):
        split_layers(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4)), 1)


TEXTS = ["#### 18", "She pays $1,234.50.", "so 3 + 4 = 7", "-12 degrees", "It costs $5", "1/2 of it",
         "12 apples, 3 pears", "x = 3.", "18.00", "no number", "\\boxed{42}", "50%", "5.5.5", "10-3", "**9**", "7,",
         "#### Step 2: add 5",
         "$.50"]


@pytest.mark.parametrize("text", TEXTS)
def test_numbers_are_read_as_by_the_harness(text):
    extraction = pytest.importorskip("lm_eval.filters.extraction",
                                     reason="needs lm_eval: pip install 'uat_repro[benchmarks]'")
    flexible = extraction.RegexFilter("(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    (theirs,), = flexible.apply([[text]], [{}])
    for ignored in (",", r"\$", r"\.$"): theirs = re.sub(ignored, "", theirs)
    assert (final_answer(text) or "[invalid]") == theirs


def problem(i):
    return dict(id=f"p{i}", cluster=f"c{i % 2}", messages=[dict(role="user", content=f"{i}?"),
                                                           dict(role="assistant", content=f"#### {i}")])




def teach(folder, steps):
    "A tiny model whose top has learnt a few answers over kept states, on its trunk."
    model, tok = tiny_model(), tiny_tokenizer()
    rows = encode_all([problem(i) for i in range(4)], tok)
    trunk, top = split_layers(model, 1)
    for part in (top.get_input_embeddings(), top.get_output_embeddings()): part.requires_grad_(False)
    data = CachedDataset(rows, HiddenCache.build(model, rows, folder, 1))
    train_in_memory(top, "mle", data, tok, 0, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2)
    return join_layers(trunk, top), tok


def test_a_top_that_was_trained_over_kept_states_answers(tmp_path):
    model, tok = teach(tmp_path, 200)
    found = exact_match(model, tok, [problem(i) for i in (3, 0, 2)], max_new_tokens=24)
    assert found["record"].tolist() == ["p3", "p0", "p2"] and found["cluster"].tolist() == ["c1", "c0", "c0"]
    assert found["answer"].tolist() == found["gold"].tolist() == ["3", "0", "2"]
    assert found["correct"].eq(1).all() and not found["cut"].any()
    assert exact_match(model, tok, [problem(3)], max_new_tokens=3)["cut"].all()


@pytest.mark.parametrize("settings", [dict(repetition_penalty=5.0), dict(no_repeat_ngram_size=1), dict(suppress_tokens=[*range(60, 200)]),
                                      dict(num_beams=3, num_return_sequences=3), dict(stop_strings=["a"])])
def test_batches_padding_ids_and_settings_of_a_model_change_no_answer(tmp_path, settings):
    model, tok = teach(tmp_path, 20)
    records = [dict(problem(i), messages=[dict(role="user", content="?" * (1 + 7 * i)), *problem(i)["messages"][1:]])
               for i in range(5)]
    alone = exact_match(model, tok, records, max_new_tokens=12, batch_size=1)
    tok.pad_token = model.generation_config.pad_token_id = model.config.pad_token_id = None
    for name, value in settings.items(): setattr(model.generation_config, name, value)
    own = model.generation_config
    model.train()
    together = exact_match(model, tok, records, max_new_tokens=12, batch_size=3)
    assert together.equals(alone) and model.training and model.generation_config is own


def test_a_base_model_is_told_how_to_get_a_template():
    tok = tiny_tokenizer()
    tok.chat_template = None
    with pytest.raises(ValueError, match="has no chat template: .*--chat-template plain.*PLAIN_TEMPLATE"): exact_match(tiny_model(), tok, [problem(1)])


def test_the_head_gets_whole_states_and_keeps_no_hook():
    "PyTorch copies the weight for each prompt of a slice, in bfloat16 on a CPU."
    model, seen = tiny_model().eval(), []
    head = model.get_output_embeddings()
    kept = head.register_forward_hook(lambda head, states, out: seen.append(states[0].is_contiguous()))
    exact_match(model, tiny_tokenizer(), [problem(i) for i in range(3)], max_new_tokens=3)
    assert len(seen) == 3 and all(seen)
    kept.remove()
    assert not head._forward_pre_hooks
