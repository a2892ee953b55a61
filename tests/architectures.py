"""Tiny random models of many architectures: two layers, hidden size 32, a vocabulary of 128."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lazyorpo_lib.fast.attention import takes_sdpa

BASE = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
WINDOW = dict(sliding_window=8)
LAYERS = dict(layer_types=["sliding_attention", "full_attention"])
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)

# Those that must take the shared row through the kit's own attention.
SHARED = {
    "llama": {},
    "qwen2": {},
    "qwen3": dict(head_dim=8),
    "phi": {},
    "gemma": dict(head_dim=8),
    "gpt_neox": {},
    "olmo2": {},
    "smollm3": {},
    "mistral": WINDOW,
    "phi3": WINDOW | dict(pad_token_id=0),
    "starcoder2": WINDOW,
    "mixtral": MOE,
    "qwen3_moe": MOE | dict(head_dim=8),
    "granite": dict(logits_scaling=8.0),
    "stablelm": {},
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "gemma3_text": WINDOW | LAYERS | dict(head_dim=8),
    "cohere2": WINDOW | LAYERS,
    "olmo3": WINDOW | LAYERS,
    "cohere": dict(logit_scale=0.25),
    "exaone4": WINDOW | LAYERS,
    "helium": dict(head_dim=8),
    "glm": dict(head_dim=8),
    "nemotron": {},
    "bitnet": {},
    "ministral3": WINDOW,
    "deepseek_v3": dict(
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}
# Those whose attention runs in transformers' eager code with dense masks.
DENSE = {
    "gemma2": WINDOW | LAYERS | dict(head_dim=8, final_logit_softcapping=5.0, attn_logit_softcapping=5.0),
    "gpt_oss": WINDOW | LAYERS | MOE | dict(head_dim=8),
    "gptj": dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "falcon": dict(alibi=False, new_decoder_architecture=False),
    "llama4_text": dict(
        attention_chunk_size=8,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=1,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
}
# Those that no shared row is right for: positions by index, or a state that runs through the row.
NOT_SHARED = {
    "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8),
    "bloom": dict(n_layer=2, n_head=4),
    "mpt": dict(d_model=32, n_heads=4, n_layers=2),
    "mamba": dict(state_size=8),
    "qwen3_next": MOE
    | dict(
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        shared_expert_intermediate_size=24,
    ),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "jamba": MOE
    | dict(
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
}


def tiny_model(name: str, seed: int = 0, **changes):
    """A random float32 model of an architecture, in evaluation mode."""
    options = (SHARED | DENSE | NOT_SHARED)[name] | changes
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **(BASE | options))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if not takes_sdpa(model):
        model.set_attn_implementation("eager")  # as load_base
    with torch.no_grad():  # larger than the usual start, so that a leak shows
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.eval()
