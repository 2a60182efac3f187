"""A Llama's weights in the code of other families.

One small real model can be had without a hub, but code for several families should be tested on language too. So the
weights of that model are written in the architecture of another family. Phi-3 is a Llama with fused projections. Gemma
multiplies its embeddings by sqrt(H), so they are divided by it and no longer tied to the head. Its norms multiply by
1 + w, so 1 is subtracted. Gemma-2 has norms after its blocks that no weight can undo. Ports are not additional models:
they test the code and say nothing about models.
"""
import torch
from transformers import AutoConfig, AutoModelForCausalLM

PORTS = ("phi3", "gemma")  # families that a Llama can be written as
KEPT = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
          hidden_act max_position_embeddings rms_norm_eps rope_parameters pad_token_id bos_token_id eos_token_id
          tie_word_embeddings""".split()


def _fuse(weights, layers):
    "Llama's projections as those of Phi-3, in place."
    for i in range(layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        weights[f"{attention}qkv_proj.weight"] = torch.cat([weights.pop(f"{attention}{x}_proj.weight") for x in "qkv"])
        weights[f"{mlp}gate_up_proj.weight"] = torch.cat([weights.pop(f"{mlp}{x}_proj.weight") for x in ("gate", "up")])


def _rescale(weights, hidden_size):
    "Llama's embeddings and norms as those of Gemma, in place."
    for name in weights:
        if name.endswith("norm.weight"): weights[name] -= 1
    weights["model.embed_tokens.weight"] /= hidden_size**.5


def port(model, family):
    "A copy of a Llama without biases in the code of one of `PORTS`, with the same logits up to rounding."
    if model.config.model_type != "llama": raise ValueError(f"only a Llama has ports, not {model.config.model_type}")
    config, weights = model.config.to_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    settings = {k: config[k] for k in KEPT}
    if family == "phi3": _fuse(weights, config["num_hidden_layers"])
    else:
        _rescale(weights, config["hidden_size"])
        settings |= dict(tie_word_embeddings=False, head_dim=config["head_dim"])
    with torch.random.fork_rng():
        ported = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=model.dtype,
                                                  attn_implementation=model.config._attn_implementation)
    ported.load_state_dict(weights)
    return ported.eval()
