"""Tiny checkpoints of each type of causal language model, and what they take."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from espnet.utils.tiny_checkpoints import tiny_tokenizers

DIM, LAYERS, WINDOW = 64, 4, 5
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
GEMMA = {"head_dim": 32, "tie_word_embeddings": True}
# The window is shorter than any text here, and everything that a type may have is there.
CONFIGS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": WINDOW, "head_dim": 32},
    "qwen2": {**SLIDING, "max_window_layers": 1},
    "qwen3": {**SLIDING, "max_window_layers": 1, "head_dim": 32, "tie_word_embeddings": True},
    "smollm3": {**SLIDING, "no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "gemma": GEMMA,
    "gemma2": {
        **GEMMA,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        **GEMMA,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 7,
        "final_logit_softcapping": 5.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
        },
    },
}
WITHOUT_BOS = ("qwen2", "qwen3")


def make_checkpoint(folder, model_type, **changes):
    """A checkpoint with its tokenizer; all weights are random, those of norms and biases too."""
    tokenizer = tiny_tokenizers()["llama"]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if model_type in WITHOUT_BOS:
        tokenizer.bos_token = None
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": len(tokenizer) + 3,
            "hidden_size": DIM,
            "intermediate_size": 2 * DIM,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.15,
            "bos_token_id": begin,
            "eos_token_id": end,
            "pad_token_id": None,
            **CONFIGS[model_type],
            **changes,
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.3 * torch.randn_like(weight)
        # Else Gemma's large embeddings, which are tied, would repeat each token for ever.
        embeddings = model.get_input_embeddings()
        embeddings.weight /= getattr(embeddings, "embed_scale", 1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
