"""Every causal family of transformers, built small: the model's own logits or a refusal, never other numbers."""
import pytest, torch, transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from uat_repro.models import head_of, hidden_states

MATCHING = 153  # families of transformers 5.23 that give their own logits
SIZES = dict(  # what configs call their sizes; each takes the names that it has
    vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64, n_positions=64,
    hidden_size=32, n_embd=32, d_model=32, num_hidden_layers=2, n_layer=2, num_layers=2, decoder_layers=2,
    encoder_layers=1, num_attention_heads=4, n_head=4, num_heads=4, decoder_attention_heads=4,
    encoder_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_head_size=8, intermediate_size=64,
    n_inner=64, d_ff=64, ffn_dim=64, decoder_ffn_dim=64, encoder_ffn_dim=64, is_decoder=True, rotary_dim=4,
    axial_pos_embds_dim=(16, 16), vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, n_group=1,
    topk_group=1, n_shared_experts=1, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8,
    mamba_num_heads=4, mamba_head_dim=8, mamba_expand=1, expand=1, ssm_state_size=8, state_size=8, n_groups=1,
    chunk_size=8, lru_width=32,
    sliding_window=6, attention_window_size=6, attention_chunk_size=8, window_size=6,  # shorter than a document
    logit_scale=.25, logits_scaling=4., lm_head_multiplier=.02, logits_mup_width_multiplier=4., unpadded_vocab_size=64,
    final_logit_softcapping=3., logits_soft_cap=3.)
LAYERS = "num_hidden_layers", "n_layer", "num_layers", "decoder_layers"
TRIES = [{}, dict(num_key_value_heads=4), *({name: n for name in LAYERS} for n in (4, 6))]  # MLA; a layer that attends
EXTRA = dict(
    bamba=dict(attn_layer_indices=[1]), granitemoehybrid=dict(layer_types=["mamba", "attention"]),
    lfm2_moe=dict(layer_types=["conv", "full_attention"]), gpt_neo=dict(attention_types=[[["global", "local"], 1]]),
    zaya=dict(num_experts_per_tok=1), xmod=dict(default_language="en_XX"),
    bailing_hybrid=dict(num_key_value_heads=4), longcat_flash=dict(num_key_value_heads=4, zero_expert_num=0),
    mpt=dict(logit_scale=None), gemma3=dict(final_logit_softcapping=None))  # the code of these two ignores the field
REFUSED = dict.fromkeys((
    "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "modernbert-decoder",
    "rembert", "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    "a head of more than a matrix")
REFUSED |= dict(prophetnet="predicts several tokens, each from a stream of its own")
UNBUILT = dict.fromkeys(("blt", "cpmant", "dots3_note", "dots3_note_text", "got_ocr2", "kimi_linear",
                         "phi4_multimodal", "roc_bert"), "parts whose sizes have other names: over 2M parameters")
UNBUILT |= dict.fromkeys(("cohere_compass_text", "dbrx", "gemma4_assistant", "gemma4_unified_assistant", "qwen4_exp",
                          "qwen4_exp_text", "xlstm", "zamba", "zamba2"), "sizes that depend on each other")
UNBUILT |= dict(gemma3n="needs timm", musicgen="three models in one", musicgen_melody="three models in one")


def sized(config, sizes):
    "The sizes that a config takes."
    def takes(name):
        try: return hasattr(config, name) and not isinstance(getattr(type(config), name, None), property)
        except Exception: return False  # differs between layers
    return {name: size for name, size in sizes.items() if takes(name)}


def small(family, sizes):
    "A model of two layers or a few more, with weights and biases that matter. Raises where the sizes do not do."
    default = AutoConfig.for_model(family)
    parts = {k: getattr(default, k, None) for k in type(default).sub_configs}
    parts = {k: dict(sized(part, sizes), model_type=part.model_type) for k, part in parts.items() if part is not None}
    config = AutoConfig.for_model(family, **sized(default, sizes), **parts)
    with torch.device("meta"): count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > 2e6: raise ValueError(f"{count / 1e6:.1f}M parameters")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, p in model.named_parameters():
        if p.dim() == 2 or name.endswith("bias"): nn.init.normal_(p, std=.2)
    return model


def built(family, documents):
    "A small model and its logits of each document alone; the reason in place of them where none can be built."
    for other in TRIES:
        try:
            model = small(family, {**SIZES, **other, **EXTRA.get(family, {})})
            logits = torch.cat([model(input_ids=ids[None]).logits[0] for ids in documents])
            if logits.isfinite().all(): return model, logits
            reason = "logits that are not finite"
        except Exception as e: reason = f"{type(e).__name__}: {e}"
    return None, reason


def outcome(family):
    "Whether a family gives its own logits, padded and packed: equal, refused, not built, or what went wrong."
    documents = [torch.randint(3, 64, (n,)) for n in (5, 17)]
    model, want = built(family, documents)
    if model is None: return "not built", want
    masks, positions = zip(*((torch.ones_like(ids), torch.arange(len(ids))) for ids in documents))
    real = pad_sequence(masks, batch_first=True)
    for batch in (dict(input_ids=pad_sequence(documents, batch_first=True), attention_mask=real),
                  dict(input_ids=torch.cat(documents)[None], position_ids=torch.cat(positions)[None])):
        shown = batch.get("attention_mask", batch["input_ids"] > 0).bool()
        try: ours = head_of(model).logits(hidden_states(model, batch)[shown])
        except ValueError as e:
            clear = model.config.model_type in str(e) and "\n" not in str(e)
            return "refused" if clear else "unclear", str(e)
        except Exception as e: return "crashed", f"{type(e).__name__}: {e}"
        if not torch.allclose(ours, want, atol=1e-4, rtol=1e-4): return "different", f"{(ours - want).abs().max():.2g}"
    return "equal", ""


@pytest.fixture(scope="module")
def outcomes():
    found = {}
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(0)
            found[family] = outcome(family)
    return found


def test_no_family_gives_other_numbers_or_a_traceback(outcomes):
    assert not {f: o for f, o in outcomes.items() if o[0] not in ("equal", "refused", "not built")}
    assert sum(how == "equal" for how, _ in outcomes.values()) > 100


@pytest.mark.skipif(not transformers.__version__.startswith("5.23."), reason="counted in transformers 5.23")
def test_families_that_match_still_do(outcomes):
    known = {"refused": REFUSED, "not built": UNBUILT}
    assert not {f: o for f, o in outcomes.items() if o[0] != "equal" and f not in known[o[0]]}
    assert sum(how == "equal" for how, _ in outcomes.values()) >= MATCHING


def test_logits_that_leave_rows_of_the_head_out_are_refused():
    model = small("inkling_text", SIZES | dict(unpadded_vocab_size=60))
    with pytest.raises(ValueError, match="inkling_text: hidden states and head do not give"): head_of(model)
