"""What is expected of every class, by family: right, unless a refusal stands below; and the page of it.

A name that stands in no family is of a newer transformers: it is printed, and fails only where numbers are
wrong in silence. A refusal's pattern is what its sentence must say.
"""

import re
from collections import Counter
from datetime import date
from importlib.metadata import version

_FAMILIES = """
Llama: llama llama4 llama4_text mllama
Mistral, Mixtral, Ministral: mistral ministral ministral3 mixtral mistral3 mistral4 mistral_large4 lighton_ocr
Qwen: qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text qwen4_exp
    qwen4_exp_text qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen2_5_omni_thinker qwen3_omni_moe_thinker
Gemma: gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified
    gemma4_unified_text gemma4_assistant gemma4_unified_assistant recurrent_gemma vaultgemma shieldgemma2
    paligemma diffusion_gemma t5gemma2
Phi: phi phi3 phimoe phi4_multimodal
DeepSeek: deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 deepseek_vl deepseek_vl_hybrid deepseek_ocr2 janus
    unlimited_ocr
GLM: glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa glm4v glm4v_moe glm46v glm_ocr glmga glm5_next
GPT: gpt2 gpt-sw3 openai-gpt gpt_oss gpt_neo gpt_neox gpt_neox_japanese gptj gpt_bigcode codegen
Granite: granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared granite4_vision
    granite_docling bamba
Falcon: falcon falcon_h1 falcon_mamba
Nemotron: nemotron nemotron_h nemotron_h_omni
OLMo, Molmo: olmo olmo2 olmo3 olmo_hybrid olmoe flex_olmo molmo2
SmolLM, SmolVLM, Idefics: smollm3 smolvlm idefics idefics2 idefics3
Cohere, Aya: cohere cohere2 cohere2_moe cohere_compass cohere_compass_text cohere2_vision aya_vision
EXAONE: exaone4 exaone_moe exaone4_5
Mamba and hybrids: mamba mamba2 jamba zamba zamba2 zaya
LFM: lfm2 lfm2_moe lfm3 lfm2_vl lfm3_vl
Hunyuan: hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl hy_v3 hy_v4
MiniMax, MiniCPM: minimax minimax_m2 minimax_m3_vl minimax_m3_vl_text minicpm3 minicpm_ocr minicpmv4_6
    minicpmv4_7 cpmant
InternLM, InternVL: internlm3 internvl
Kimi, dots, ERNIE, Seed, LongCat, MiMo: kimi_linear kimi_k25 dots1 dots3_note dots3_note_text ernie4_5
    ernie4_5_moe ernie4_5_vl_moe seed_oss longcat_flash mimo_v2_flash youtu step3p7
LLaVA and its kin: llava llava_next llava_next_video llava_onevision vipllava video_llava video_llama_3 ovis2
Other decoders: afmoe apertus arcee aria aria_text axk1 axk2 bailing_hybrid beam biogpt bitnet bloom blt ctrl
    cwm dbrx diffllama doge flint fuyu helium hrm_text hyperclovax hyperclovax_vision_v2 inkling2
    inkling2_text inkling_mm_model inkling_text iquestcoder jais2 jetmoe kolibri1 laguna mellum
    modernbert-decoder moshi mpt nanochat opt persimmon reformer rwkv solar_open stablelm starcoder2 xglm
    xlstm emu3 got_ocr2 git moss_transcribe_diarize musicgen musicgen_melody
Encoders used as decoders: bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert
    rembert roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod
Decoders of encoder-decoders: bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus
    plbart prophetnet trocr whisper
Other classes of image and text: blip blip-2 chameleon cosmos3_edge cosmos3_omni evolla fast_vlm florence2
    instructblip instructblipvideo kosmos-2 kosmos-2.5 muse_glimmer muse_spark paddleocr_vl perception_lm pi0
    pix2struct pp_chart2table pp_formulanet qianfan_ocr udop vision-encoder-decoder
"""
_LINES = [line.split(": ") for line in re.sub(r"\n +", " ", _FAMILIES).strip().splitlines()]
FAMILY = {name: family for family, names in _LINES for name in names.split()}

_AHEAD = "causal|ahead|sees|later tokens"  # it is no language model that predicts
_RANDOM = "random|the same twice|determin"
_UNLIKE = (
    "separate|unlike|differ|exactly|plain text|sees the tokens"  # no layout has the numbers of plain forwards
)
_NO_TEXT = "text|pixel|image|sound|audio|encoder|exactly|causal language|give the language"
REFUSED = {
    **dict.fromkeys(
        "musicgen musicgen_melody blip blip-2 diffusion_gemma idefics instructblip".split(), _NO_TEXT
    ),
    **dict.fromkeys("instructblipvideo kosmos-2 kosmos-2.5 pi0 pix2struct pp_formulanet".split(), _NO_TEXT),
    **dict.fromkeys("t5gemma2 udop vision-encoder-decoder evolla molmo2".split(), _NO_TEXT),
    "shieldgemma2": "lack",
    "xlm": _AHEAD,
    "xlnet": _AHEAD + "|" + _UNLIKE,
    "paligemma": _AHEAD,
    "reformer": _RANDOM + "|" + _UNLIKE,
    "prophetnet": _UNLIKE,
    "cpmant": _UNLIKE,
    "blt": "answer|generat|bytes|exactly",
    "xlstm": "answer|generat|exactly",
    "emu3": "lack|missing",
    "llama, dynamic rope": _RANDOM + "|rope|position",
    "phi3, longrope": _UNLIKE + "|rope|position|original_max_position_embeddings",
    "gemma3_text, bidirectional": _AHEAD,
    "xlnet, bi": _AHEAD,
} | {
    f"{name} (is_decoder=False)": _AHEAD
    for name in ("bert", "roberta", "xlm-roberta", "electra", "big_bird", "camembert")
}
# None of these could be made small, or given text alone.
NOT_MADE = {
    **dict.fromkeys(["gemma3n", "fast_vlm", "perception_lm"], "needs timm"),
    "inkling_mm_model": "needs scipy",
    **dict.fromkeys(["florence2", "muse_spark"], "no small form found"),
    **dict.fromkeys(["gemma4_assistant", "gemma4_unified_assistant"], "drafts for another model"),
}


def complaints(report: dict) -> list[str]:
    """List what is not as it is expected of a class, each with stage and figure."""
    name, verdict, why = report["name"], report["verdict"], report["why"]
    told = f"{name} ({report['list']}) is {verdict}: {why}"
    if name not in FAMILY and report["list"] in ("main", "images"):
        return [told] if verdict == "wrong" else []
    if verdict == "not made":
        return [] if name in NOT_MADE else [told]
    if verdict == "refused":
        pattern = REFUSED.get(name) or (report["list"] == "wide" and "window|chunk|long")
        return [] if pattern and re.search(pattern, why) and why.endswith(".") and "\n" not in why else [told]
    if verdict == "right":
        return []  # also where a refusal would do
    return [told]


# The page.

_HEAD = """# Which models train

Every class of transformers {transformers} that `AutoModelForCausalLM` or `AutoModelForImageTextToText`
knows, by family. Look for the `model_type` of your model's `config.json`.

- **right**: it trains, in full and with adapters; log-probabilities and gradients are those of plain
separate forwards.
- **refused**: the run ends at once, with the sentence that stands there in short.
- **not tried**: no small model of it could be made here that takes text alone.

{counts}.

Layouts, quickest first: *shared* computes a pair's prompt once, in a row without padding;
*shared, dense masks* does so in transformers' own attention, whose cost grows with the square of the
row; *packed* computes it twice; *padded* does that in padded rows. Image-and-text classes train their
text part, on pairs of text. *No adapter on*: matrices that LoRA and QLoRA leave as they are, beside
embeddings and head.
"""
_FOOT = """
## How this was made

`python -m tests.archs --write docs/models.md`, transformers {transformers}, torch {torch}, peft {peft},
on a CPU, {date}. Of each class a random model of two to five layers in float32, with windows of {window}
tokens, and a greatest position that is shorter than the batch's row, goes through the kit's own doors:
config, plan, load, scorer, a step in full, a step of adapters, answers, save, reload, merge.
Log-probabilities and gradients (of a whole step, of one split pair by pair, with every layer recomputed,
of the adapters) must equal those of plain, unpadded forwards of each prompt and answer to 1e-5,
relative, or to ten times what float32 costs the plain model; log-probabilities after saving, reloading
and merging to 1e-4 nats. `tests/test_archs.py` does the same in CI, and again with windows longer than
the test at the start of a run looks. Real checkpoints, 16 bit and GPUs were not tried for this page.

transformers 5.24.0, tried on 2026-11-26 (`--only`, its new names), adds `apertus1p5_text`, `dory`, `exaone`,
`lara_mini`, `sarvam_mla` and `sarvam_moe`, which are right, and `apertus1p5`, `hy_v4_vl`, `inkling2_loop` and
`inkling2_loop_text`, of which no small form was found. A whole Gemma 3n with timm is right (torch 2.11).
"""


_TOWERS = "vision|visual|image|img|audio|speech|projector|tower|vq|pixel|perceiver|resampler|qformer"


def row(report: dict) -> str:
    """Write a class's line of the page."""
    name, verdict, why = report["name"], report["verdict"], report["why"]
    bare = {path.rsplit(".", 1)[-1] for path in report.get("without", ()) if not re.search(_TOWERS, path)}
    note = ", ".join(f"`{part}`" for part in sorted(bare))
    if verdict == "not made":
        verdict, note = "not tried", NOT_MADE.get(name, "")
    elif verdict != "right":
        told = re.sub(r"The model '[^']*' |^[\w' -]+: ", "", " ".join(why.split())).replace("|", "/")
        note = told if len(told) < 160 else f"{told[:160]}…"
    return f"| `{name}` | {report.get('class', '')} | {verdict} | {report.get('rung', '')} | {note} |"


def page(reports: list[dict], window: int) -> str:
    """Write the page of all reports, by family."""
    counted = Counter("not tried" if r["verdict"] == "not made" else r["verdict"] for r in reports)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in counted.most_common())
    about = {name: version(name) for name in ("transformers", "torch", "peft")} | dict(window=window)
    text = [_HEAD.format(counts=f"{len(reports)} classes: {counts}", **about)]
    families = [family for family, _ in _LINES] + ["New"]
    for family in families:
        found = [r for r in reports if FAMILY.get(r["name"], "New") == family]
        if found:
            text += [
                f"## {family}\n",
                "| model_type | class | verdict | layout | no adapter on; or why |",
                "|---|---|---|---|---|",
            ]
            text += [*map(row, sorted(found, key=lambda r: r["name"])), ""]
    return "\n".join(text) + _FOOT.format(date=date.today(), **about)
