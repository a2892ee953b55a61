"""How each class that transformers ships is made small: a random float32 model of two to five layers.

Sizes go by the names of a config's fields, whatever the class; SPECIAL has what a class needs beside them.
Weights are drawn larger than the usual start, so that a leak or a wrong head shows. Knows nothing of the kit.
"""

import contextlib
import dataclasses
import re

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES

# Tokens back that a layer looks, and the greatest position, by all their names.
WINDOWS = (
    "sliding_window attention_chunk_size window_size attention_window_size keep_window_size local_attention "
    "sliding_window_size index_topk local_attention_window_len indexer_budget local_attn_chunk_length"
).split()
POSITIONS = (
    "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
    "max_source_positions seq_length"
).split()
WINDOW = 8  # shorter than the pairs
POSITION = 64  # longer than every pair, shorter than a batch row of three
SPARE = 3  # the id of image tokens and the like, which no pair holds
_SIZES = (
    (32, """hidden_size n_embd d_model emb_dim embedding_dim embedding_size word_embed_proj_dim embed_dim dim
        input_embedding_size output_embedding_size lru_width cross_attention_hidden_size q_lora_rank
        hidden_dim backbone_hidden_size output_dim projection_dim attention_hidden_size decoder_hidden_size
        vision_embed_dim vision_output_dim out_hidden_size adapter_out_dim adapter_in_dim adapter_input_size
        mm_embed_dim router_hidden_size"""),
    (2, """num_hidden_layers n_layer n_layers num_layers depth decoder_layers num_decoder_layers
        encoder_layers num_encoder_layers num_blocks"""),
    (4, """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads
        linear_num_attention_heads linear_num_heads linear_num_value_heads attention_groups"""),
    (16, "index_n_heads indexer_n_heads"),  # many: where all scores are 0 after a ReLU, keys tie by chance
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"),
    (48, """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim dim_ff dff d_inner feed_forward_size
        shared_intermediate_size intermediate_size_mlp dense_intermediate_size mlp_dim ffn_hidden_size
        prefix_dense_intermediate_size"""),
    (24, """moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
        expert_ffn_hidden_size shared_experts_intermediate_size"""),
    (8, """head_dim kv_channels swa_head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim d_head dim_head
        rotary_dim global_head_dim attention_head_size swa_v_head_dim linear_key_head_dim linear_head_dim
        linear_value_head_dim index_head_dim indexer_head_dim hidden_size_per_layer_input hc_lowrank
        gated_norm_rank d_rel chunk_size mamba_chunk_size block_size patch_size mamba_d_state state_size
        ssm_state_size d_state shape_embed_dim pronunciation_embed_dim laurel_rank"""),
    (16, "kv_lora_rank qk_head_dim image_size"),
    (4, """num_experts n_routed_experts num_local_experts moe_num_experts num_routed_experts mamba_dt_rank
        time_step_rank mamba_n_heads mamba_num_heads n_mamba_heads"""),
    (2, """num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token moe_top_k zero_expert_num
        eos_token_id"""),
    (1, """n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts bos_token_id
        first_k_dense_replace num_dense_layers decoder_start_token_id"""),
    (128, """vocab_size decoder_vocab_size vocab_size_per_layer_input padded_vocab_size audio_vocab_size
        shape_vocab_size pronunciation_vocab_size"""),
    (0, "pad_token_id num_nextn_predict_layers"),
    (False, "use_mamba_kernels"),
    (True, "is_decoder use_sliding_window"),
    (WINDOW, " ".join(WINDOWS)),
    (POSITION, " ".join(POSITIONS)),
)  # fmt: skip
SIZES = {name: value for value, names in _SIZES for name in names.split()}
# Attributes that are lists with one entry a layer: one layer of each kind.
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attn_layers")

_MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=16, mamba_expand=2, mamba_n_groups=1)
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_TWO = ["sliding_attention", "full_attention"]
_GEMMA4 = dict(layer_types=_TWO * 2, num_hidden_layers=4, num_kv_shared_layers=2, global_head_dim=16)
_QWEN4 = dict(indexer_n_heads=16, indexer_kv_heads=1, indexer_budget=8, indexer_compress_ratio=2, head_dim=8)
_DOTS = dict(
    dict.fromkeys(["head_dim", "swa_q_lora_rank", "swa_kv_lora_rank", "swa_head_dim"], 16),
    **dict.fromkeys(["num_key_value_heads", "swa_num_attention_heads", "swa_num_key_value_heads"], 4),
    **dict.fromkeys(["swa_qk_nope_head_dim", "swa_v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"], 8),
    num_hidden_layers=3,
    layer_types=["indexed_attention", "indexed_attention", "sliding_attention"],
)
_LOGITS = dict(logits_scaling=8.0)
_TALL = dict(vocab_size=260)
SPECIAL: dict[str, dict] = {
    "bamba": _MAMBA2 | dict(attn_layer_indices=[1]),
    "blt": _TALL
    | dict(
        encoder_hash_byte_group_vocab=50,
        patcher_config=_TALL,
        encoder_config=_TALL | dict(hidden_size_global=32),
        decoder_config=_TALL | dict(hidden_size_global=32),
    ),
    **dict.fromkeys(["cohere", "cohere2", "cohere2_moe"], dict(logit_scale=0.25)),
    "cohere_compass_text": dict(
        layer_types=_TWO, logit_scale=0.25, rope_parameters=dict.fromkeys(_TWO, _ROPE)
    ),
    "dbrx": dict(
        attn_config=dict(rope_theta=1e4, kv_n_heads=2, clip_qkv=8),
        ffn_config=dict(ffn_hidden_size=24, moe_top_k=2),
    ),
    **dict.fromkeys(["dots3_note_text", "dots3_note"], _DOTS),
    "falcon_h1": _MAMBA2
    | dict(num_hidden_layers=3, mamba_d_ssm=64, key_multiplier=0.7)
    | dict(lm_head_multiplier=0.5, embedding_multiplier=2.0),
    "gemma2": dict(query_pre_attn_scalar=8, final_logit_softcapping=5.0, attn_logit_softcapping=5.0),
    "gemma3_text": dict(query_pre_attn_scalar=8),
    "vaultgemma": dict(query_pre_attn_scalar=8, final_logit_softcapping=5.0),
    "gemma3n_text": dict(layer_types=_TWO * 2, num_hidden_layers=4, num_kv_shared_layers=2),
    **dict.fromkeys(["gemma4_text", "gemma4_unified_text"], _GEMMA4),
    **dict.fromkeys(["gemma4", "gemma4_unified"], dict(text_config=_GEMMA4)),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granite": _LOGITS | dict(embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.3),
    "granitemoehybrid": _MAMBA2 | _LOGITS | dict(layer_types=["mamba", "attention"]),
    **dict.fromkeys(["granitemoe", "granite_swa", "granitemoe_swa", "hyperclovax"], _LOGITS),
    "granitemoeshared": _LOGITS | dict(shared_intermediate_size=24),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "longcat_flash": dict(num_layers=1, num_hidden_layers=2),
    "mamba2": dict(num_heads=4, head_dim=16, expand=2, n_groups=2),
    "minicpm3": dict(dim_model_base=16),
    "minimax_m3_vl_text": dict(index_block_size=4, index_topk_blocks=2, index_local_blocks=1),
    "mllama": dict(num_hidden_layers=4, cross_attention_layers=[3]),
    "nemotron_h": dict(mamba_head_dim=16, n_groups=2),
    "phi4_multimodal": dict(
        audio_config=dict(nemo_conv_channels=16, ext_pw_out_channel=32, depthwise_separable_out_channel=32)
    ),
    **dict.fromkeys(["qwen4_exp_text", "qwen4_exp"], _QWEN4),
    "reformer": dict(attn_layers=["local", "lsh"], axial_pos_embds=False, num_buckets=4)
    | dict(local_attn_chunk_length=8, lsh_attn_chunk_length=8),
    "xlnet": dict(attn_type="uni"),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(num_hidden_layers=5, attn_layer_period=2, attn_layer_offset=1)
    | dict(attention_hidden_size=64, attention_head_dim=16),
    "zaya": dict(num_experts_per_tok=1, layer_types=["hybrid", "hybrid_sliding"], num_hidden_layers=2),
}


def _text(**changes) -> dict:
    return dict(text_config=changes)


_MROPE = _text(rope_parameters=_ROPE | {"mrope_section": [2, 1, 1]})
# The other parts of composite checkpoints, where sizes must agree.
COMPOSITES: dict[str, dict] = {
    "mllama": dict(
        vision_config=dict(intermediate_layers_indices=[0, 1], num_global_layers=2, vision_output_dim=96)
        | dict(image_size=16, patch_size=8, max_num_tiles=2, supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]])
    ),
    "llama4": dict(
        vision_config=dict(image_size=16, patch_size=8)
        | dict.fromkeys(["projector_input_dim", "projector_output_dim", "vision_output_dim"], 32)
    ),
    "emu3": dict(
        vq_config=dict(base_channels=32, channel_multiplier=[1, 1], z_channels=4, latent_channels=4)
        | dict(codebook_size=16, num_res_blocks=1),
        vocabulary_map={"<image>": 3} | {f"<|visual token {i:06d}|>": 10 + i for i in range(16)},
    ),
    "dots3_note": dict(
        vision_config=dict(num_hidden_layers=2, mlp_layer_types=["dense", "dense"], per_layer_config={}),
        audio_config=dict(downsample_hidden_size=16, feature_size=16),
    ),
    "glm4v_moe": _text(rope_parameters=_ROPE | {"mrope_section": [1, 1, 0]}),
    "hunyuan_vl": _text(rope_parameters=_ROPE | {"mrope_section": [1, 1, 1, 1]}),
    "ernie4_5_vl_moe": _text(
        moe_intermediate_size=[24, 24], rope_parameters=_ROPE | {"mrope_section": [1, 1, 2]}
    ),
    "glm5_next": _text(index_kpool=8, qk_rope_head_dim=0),
    "cohere_compass": _text(**SPECIAL["cohere_compass_text"]),
    "deepseek_ocr2": _text(mlp_layer_types=["dense", "sparse"]),
    "inkling2": dict(vision_config=dict(text_hidden_size=32)),
    "nemotron_h_omni": dict(
        vision_config=dict(video_temporal_patch_size=2),
        text_config=SPECIAL["nemotron_h"],
        projector_hidden_size=48,
        vision_hidden_size=32,
    ),
    "molmo2": dict(vision_config=dict(image_size=[16, 16]), adapter_config=dict(vision_feature_layer=[0, 1])),
    "granite4_vision": dict(vision_config=dict(hidden_size=64))
    | dict(deepstack_layer_map=[], spatial_target_layers=[], downsample_rate="1/2"),
    "chameleon": dict(
        vq_config=dict(base_channels=32, channel_multiplier=[1, 1], latent_channels=32, num_embeddings=16),
        vocabulary_map={"<image>": 3, "IMGIMGAZ": 4, "IMGIMGBZ": 127},
    ),
    "janus": dict(
        vq_config=dict(base_channels=32, channel_multiplier=[1, 1], latent_channels=32, num_embeddings=16)
        | dict(projection_dim=32, image_token_embed_dim=32)
    ),
    **dict.fromkeys(
        ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"], dict(vision_start_token_id=SPARE) | _MROPE
    ),
    **dict.fromkeys(
        ["cosmos3_edge", "qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "glmga", "paddleocr_vl"],
        _MROPE,
    ),
}
_OLD = dict(original_max_position_embeddings=24)
_YARN = _OLD | dict(rope_type="yarn", factor=4.0, rope_theta=1e4)
_LLAMA3 = _YARN | dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)
_LONG = _OLD | dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
_NONE_SHARED = _GEMMA4 | dict(num_kv_shared_layers=0, hidden_size_per_layer_input=0)
_NGRAMS = dict(ple_layer_ids=[1], ple_embed_dim=32, heads_per_ngram=2, ngram_vocab_size_base=50)
# What checkpoints have and the configs above leave out: {name: (model type, changes)}.
VARIANTS: dict[str, tuple[str, dict]] = {
    "mpt, logit_scale=inv_sqrt_d_model": ("mpt", dict(logit_scale="inv_sqrt_d_model")),
    "mpt, logit_scale=0.5": ("mpt", dict(logit_scale=0.5)),
    "mpt without alibi": ("mpt", dict(attn_config=dict(alibi=False))),
    "falcon with alibi": ("falcon", dict(alibi=True)),
    "falcon, new decoder": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    "opt-350m": ("opt", dict(do_layer_norm_before=False, word_embed_proj_dim=16)),
    "gpt2, scores scaled by layer": (
        "gpt2",
        dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    ),
    "llama, dynamic rope": (
        "llama",
        dict(
            rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=1e4), max_position_embeddings=24
        ),
    ),
    "llama, yarn": ("llama", dict(rope_parameters=_YARN)),
    "llama, llama3 rope": ("llama", dict(rope_parameters=_LLAMA3)),
    "phi3, longrope": ("phi3", dict(rope_parameters=_LONG) | _OLD),
    "llama, tied, biases": ("llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "stablelm, parallel, qk norm": ("stablelm", dict(use_parallel_residual=True, qk_layernorm=True)),
    "gpt_neox, not parallel": ("gpt_neox", dict(use_parallel_residual=False)),
    "gemma4_text with experts": ("gemma4_text", _NONE_SHARED | dict(enable_moe_block=True)),
    "gemma4_text, nothing shared": ("gemma4_text", _NONE_SHARED),
    "gemma3_text, bidirectional": ("gemma3_text", dict(use_bidirectional_attention=True)),
    "qwen4_exp_text with n-grams": (
        "qwen4_exp_text",
        _QWEN4 | _NGRAMS | dict(make_ngram_vocab_size_divisible_by=8, split_ngram_parts=1),
    ),
    "granitemoehybrid, attention alone": (
        "granitemoehybrid",
        _MAMBA2 | _LOGITS | dict(layer_types=["attention"] * 2, position_embedding_type="rope"),
    ),
    "minicpm3 default scale": ("minicpm3", {}),
    "deepseek_v32, nothing left out": ("deepseek_v32", dict(index_topk=512)),
    "xlnet, bi": ("xlnet", dict(attn_type="bi")),
    **{
        f"{name} (is_decoder=False)": (name, dict(is_decoder=False))
        for name in ("bert", "roberta", "xlm-roberta", "electra", "big_bird", "camembert")
    },
}


def names_of(kind: str) -> dict[str, tuple[str, dict]]:
    """Give {name: (model type, changes)} of a list: main, images, side, or wide: of main and with windows."""
    if kind == "side":
        return VARIANTS
    if kind == "images":
        return {
            name: (name, SPECIAL.get(name, {}) | COMPOSITES.get(name, {}))
            for name in IMAGES
            if name not in CAUSAL
        }
    names = {name: (name, SPECIAL.get(name, {})) for name in CAUSAL}
    return {n: job for n, job in names.items() if has_windows(n)} if kind == "wide" else names


def has_windows(model_type: str) -> bool:
    return any(f.name in WINDOWS for f in dataclasses.fields(CONFIG_MAPPING[model_type]))


def shrink(cls, changes: dict, sizes: dict) -> dict:
    """The keyword arguments of a tiny config of class `cls`: `sizes` by name, `changes` above them."""
    changes, fields, out = dict(changes), {f.name: f for f in dataclasses.fields(cls)}, {}
    try:
        default = cls()
    except Exception:  # a config without sensible defaults: only its fields are known
        default = None
    for name, field in fields.items():
        value = None if field.default is dataclasses.MISSING else field.default
        with contextlib.suppress(Exception):  # an attribute that differs by layer has no value of its own
            value = value if default is None else getattr(default, name)
        if name in sizes:
            out[name] = sizes[name]
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            out[name] = 0.0
        elif isinstance(value, int) and value > 127 and name.endswith(("_token_id", "_token_index")):
            out[name] = SPARE
        if name in KINDS and isinstance(value, list):
            out[name] = list(dict.fromkeys(value))
    layers = changes.get("num_hidden_layers") or max([2, *(len(out[n]) for n in KINDS if n in out)])
    out |= {name: (out[name] * layers)[:layers] for name in KINDS if name in out}
    if "num_hidden_layers" in fields:
        out["num_hidden_layers"] = layers
    for name, sub in cls.sub_configs.items():
        given, auto = changes.pop(name, {}), sub is AutoConfig
        sub = type(getattr(default, name, None)) if auto else sub
        if dataclasses.is_dataclass(sub):
            out[name] = shrink(sub, given, sizes) | ({"model_type": sub.model_type} if auto else {})
    if out.get("kv_lora_rank") and "num_key_value_heads" in out:
        out["num_key_value_heads"] = sizes["num_attention_heads"]
    return out | changes


def tiny_checkpoint(model_type: str, changes: dict, good, sizes: dict | None = None):
    """A random model of the class whose checkpoints a model type has: where a causal LM is one part of a
    multimodal checkpoint, that one. `good` tells of a model whether its numbers make sense."""
    sizes = SIZES | (sizes or {})
    cls = CONFIG_MAPPING[model_type]
    auto = AutoModelForCausalLM if cls in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
    model_class = auto._model_mapping[cls]
    own = getattr(model_class, "config_class", None) or cls
    part = next((n for n, sub in cls.sub_configs.items() if sub is own), None)
    if part and cls in AutoModelForImageTextToText._model_mapping:
        model_class = AutoModelForImageTextToText._model_mapping[cls]
        changes = {part: changes} | COMPOSITES.get(model_type, {})
    elif part:
        cls = own
    return drawn(model_class, cls(**shrink(cls, changes, sizes)), good)


def drawn(model_class, config, good):
    """The model with random weights, larger than the usual start, as far as its numbers stay sound."""
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=torch.float32)
    if (size := sum(p.numel() for p in model.parameters())) > 20e6:
        raise RuntimeError(f"{size / 1e6:.0f} million weights")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    keep = re.compile(r"A_log|dt_bias|decay|Lambda|recurrent_param|\.A$")  # of recurrences, would run away
    for spread in (0.2, 0.1, None):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(start[n])
                if spread and p.is_floating_point() and not keep.search(n):
                    p.normal_(0, spread) if p.dim() > 1 else p.add_(torch.randn_like(p) * spread / 2)
            for module in model.modules():
                if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx] = 0  # as its own start has it, and some loading again
        if good(model.eval()):
            return model
    raise RuntimeError("its plain forward is not finite")
