"""Templates of the shapes that public models have: no text of a pair is lost, none is there twice."""

import itertools
import random
import re

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo.data import Pair
from lazyorpo_lib.orpo.encoding import Encoder, PairFile, check_model, encode_rows
from lazyorpo_lib.rows import template
from lazyorpo_lib.rows.candidates import candidates
from lazyorpo_lib.rows.template import Template

START = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HEAD = "<|im_start|>{{ m.role }}\n"
LAST_USER = (
    "{% set ns = namespace(q=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.q = loop.index0 %}{% endif %}{% endfor %}"
)
CALLS = "{% for t in m.tool_calls or [] %}<tool_call>\n{{ t.function | tojson }}\n</tool_call>{% endfor %}"
SHAPES = {
    "chatml": "{% for m in messages %}" + HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}" + START,
    "trims": "{% for m in messages %}" + HEAD + "{{ m.content | trim }}<|im_end|>\n{% endfor %}" + START,
    "date": (
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}<|im_start|>system\n"
        "Today is {{ strftime_now('%d %b %Y') }}.\n{{ s }}<|im_end|>\n"
        "{% for m in messages if m.role != 'system' %}" + HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}"
        + START
    ),
    "always a think block": (
        LAST_USER + "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content %}"
        "{% set r = '' %}{% if m.reasoning_content is string %}{% set r = m.reasoning_content %}"
        "{% elif '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
        "{% if loop.index0 > ns.q %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}" + CALLS
        + "<|im_end|>\n{% else %}" + HEAD + "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + START
    ),
    "thinks when told to": (
        LAST_USER + "{% for m in messages %}" + HEAD + "{% if m.role == 'assistant' and loop.last %}<think>"
        "\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "throws reasoning away": (
        "{% for m in messages %}" + HEAD + "{{ m.content.split('</think>')[-1] if m.role == 'assistant' "
        "else m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    "system with the last message alone": (
        "{% set talk = messages[1:] if messages[0].role == 'system' else messages %}{% for m in talk %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
    ),
    "no system": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + HEAD + "{{ m.content | trim }}<|im_end|>\n{% endfor %}" + START
    ),
    "drops every system turn": (
        "{% for m in messages if m.role != 'system' %}" + HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}"
        + START
    ),
    "last turn alone": HEAD.replace("m.role", "'user'") + "{{ messages[-2].content }}<|im_end|>\n"
    "<|im_start|>assistant\n{{ messages[-1].content }}<|im_end|>\n",
    "channels": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if loop.last %}{% if m.thinking %}<|start|>"
        "assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}<|start|>assistant"
        "<|channel|>final<|message|>{{ m.content }}<|return|>{% else %}<|start|>assistant<|channel|>final"
        "<|message|>{{ m.content }}<|end|>{% endif %}{% else %}<|start|>{{ m.role }}<|message|>"
        "{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    "tools": (
        "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n"
        "{% endif %}{% for m in messages %}" + HEAD + "{{ m.content }}" + CALLS + "<|im_end|>\n{% endfor %}"
        + START
    ),
    "no generation prompt": "{% for m in messages %}" + HEAD + "{{ m.content }}" + CALLS
    + "<|im_end|>\n{% endfor %}",
}  # fmt: skip
SPECIAL = "<|im_start|> <|im_end|> <|endoftext|> <|start|> <|message|> <|channel|> <|end|> <|return|>".split()
WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # tokens, but not special


def tokenizer_of(text):
    vocabulary = {t: i for i, t in enumerate(SPECIAL + WORDS + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in WORDS])
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    found.chat_template = text
    return found


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def written(shape, *prompt, chosen="Yes.", rejected="No.", clock=None, **more):
    """Prompt, chosen and rejected as the tokens decode; or the reason."""
    tokenizer = tokenizer_of(SHAPES.get(shape, shape))
    encoder = Encoder(Template(tokenizer, clock), max_prompt_tokens=2000, max_tokens=4000)
    prompt = tuple(said("user", turn) if isinstance(turn, str) else turn for turn in prompt)
    ((_, found),) = encoder.encode([Pair(0, prompt, chosen, rejected, **more)])
    return found if isinstance(found, str) else tuple(tokenizer.decode(ids) for ids in found[1:])


def generation(shape, *prompt, **more):
    prompt = [said("user", turn) if isinstance(turn, str) else turn for turn in prompt]
    tokenizer = tokenizer_of(SHAPES[shape])
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **more)


# ---- every message is in what the model reads

TALKS = {
    "one": ["Where is Bergen?"],
    "system": [said("system", "Answer like a pirate."), "Where is Bergen?"],
    "turns": [said("system", "Be brief."), "Hi", said("assistant", "Yes?"), "Where is Bergen?"],
    "the same twice": ["Yes.", said("assistant", "Yes."), "Yes."],
    "short": [said("system", "s"), "a"],
}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_text_is_there_once_or_the_pair_is_refused(shape, talk):
    prompt = [said("user", turn) if isinstance(turn, str) else turn for turn in TALKS[talk]]
    found = written(shape, *prompt)
    if found == "prompt_text_lost":
        assert shape == "last turn alone" and len(prompt) > 1
        return
    assert found[1].strip() in ("Yes.<|im_end|>", "Yes.<|return|>")
    for turn in prompt:
        wanted = sum(turn["content"] == other["content"] for other in prompt)
        assert len(re.findall(rf"(?<![\w.|/]){re.escape(turn['content'])}(?!\w)", found[0])) == wanted


def test_a_system_turn_goes_into_the_first_user_turn_where_the_template_loses_it():
    for shape in ("system with the last message alone", "no system", "drops every system turn"):
        prompt, *_ = written(shape, *TALKS["turns"])
        assert "Be brief.\n\nHi" in prompt
    shape = "system with the last message alone"
    assert written(shape, *TALKS["system"])[0] == "[INST] Answer like a pirate.\n\nWhere is Bergen?[/INST]"


def test_words_that_switch_a_template_may_vanish_and_reasoning_of_earlier_turns_too():
    shape = SHAPES["chatml"].replace("{{ m.content }}", "{{ m.content.replace('/no_think', '').strip() }}")
    assert "Be brief." in written(shape, said("system", "Be brief. /no_think"), "Hi")[0]
    earlier = said("assistant", "<think>\nhm\n</think>\n\nHello.")
    assert "Hello." in written("throws reasoning away", "Hi", earlier, "Why?")[0]


# ---- reasoning: one block, and the prompt ends as that of generation

THOUGHT = "<think>\nseven 11s\n</think>\n\n77"
FORMS = {
    "in the text": dict(chosen=THOUGHT, rejected="<think>\nguess\n</think>\n\n78"),
    "as a model emits it": dict(chosen="seven 11s\n</think>\n\n77", rejected="guess\n</think>\n\n78"),
    "in a field": dict(
        chosen="77", rejected="78",
        chosen_with={"reasoning_content": "seven 11s"}, rejected_with={"reasoning_content": "guess"},
    ),
    "on one side": dict(chosen="77", rejected="78", chosen_with={"reasoning_content": "seven 11s"}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", ["always a think block", "thinks when told to", "throws reasoning away"])
def test_reasoning_is_one_block_after_the_prompt_of_generation(shape, form):
    prompt, chosen, rejected = written(shape, "11 * 7?", **FORMS[form])
    assert prompt == generation(shape, "11 * 7?", enable_thinking=True)
    assert prompt.endswith("assistant\n<think>\n" if "away" in shape else "assistant\n")
    start = prompt[prompt.rindex("<|im_start|>assistant\n") + len("<|im_start|>assistant\n") :]
    assert start + chosen == THOUGHT + "<|im_end|>"
    thought = "" if form == "on one side" else "guess"
    assert start + rejected == f"<think>\n{thought}\n</think>\n\n78<|im_end|>"


def test_reasoning_goes_where_the_template_has_a_place_for_it():
    for form in FORMS.values():
        prompt, chosen, _ = written("channels", "11 * 7?", **form)
        assert prompt.endswith("<|start|>assistant")
        final = "<|start|>assistant<|channel|>final<|message|>77<|return|>"
        assert chosen == f"<|channel|>analysis<|message|>seven 11s<|end|>{final}"


def test_reasoning_that_a_template_does_not_know_is_text_or_refused_by_name():
    assert written("chatml", "11 * 7?", **FORMS["in the text"])[1] == THOUGHT + "<|im_end|>"
    assert written("chatml", "11 * 7?", **FORMS["in a field"]) == "reasoning"


def test_a_plain_answer_is_scored_after_the_empty_block_that_the_template_writes():
    prompt, chosen, _ = written("always a think block", "Hi")
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n") and chosen == "Yes.<|im_end|>"


# ---- tools

CALL = {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]}
SPELLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TOOL = (
    {"type": "function", "function": {"name": "weather", "description": "of a “city”", "parameters": {}}},
)


@pytest.mark.parametrize("text", ["Let me look.", ""])
@pytest.mark.parametrize("shape", ["tools", "always a think block", "no generation prompt"])
def test_a_tool_call_is_scored_as_the_template_writes_it(shape, text):
    prompt, chosen, rejected = written(shape, "Rain?", chosen=text, chosen_with=CALL)
    assert chosen == f"{text}{SPELLED}<|im_end|>" and rejected == "No.<|im_end|>"
    assert prompt.endswith("assistant\n" if "think" not in shape else "</think>\n\n")


@pytest.mark.parametrize("shape", ["chatml", "channels", "throws reasoning away"])
def test_a_template_without_tools_refuses_them_by_name(shape):
    assert written(shape, "Rain?", chosen_with=CALL) == "tool_calls"
    assert written(shape, "Rain?", said("assistant", "Hm.", **CALL), "And?") == "tool_calls"
    assert written(shape, "Rain?", tools=TOOL) == "tools"


def test_a_call_that_is_nested_deep_is_refused():
    deep = {}
    for _ in range(900):
        deep = {"a": deep}
    call = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": deep}}]}
    assert written("tools", "Rain?", chosen_with=call) in ("template_refuses", "tool_calls")


def test_tools_and_what_they_answered_are_read():
    result = said("tool", '{"rain": "4 mm"}', name="weather")
    prompt, *_ = written("tools", "Rain?", said("assistant", "", **CALL), result, tools=TOOL)
    assert "of a “city”" in prompt and SPELLED in prompt and '{"rain": "4 mm"}' in prompt


# ---- the rule, over talks of every kind


@pytest.mark.parametrize("shape", SHAPES)
def test_of_a_kept_pair_every_text_is_read_or_scored_once(shape):
    rng, count, tokenizer = random.Random(shape), itertools.count(), tokenizer_of(SHAPES[shape])
    encoder = Encoder(Template(tokenizer), max_prompt_tokens=3000, max_tokens=6000)

    def text():
        outer = rng.choice(["", "", " ", "\n", "    "])
        return f"{outer}text {next(count)} end{rng.choice(['', ' ', chr(10)])}"

    def pair(index):
        roles = rng.choice(
            ["user", "system user", "user assistant user", "user user", "system user assistant user"]
        )
        prompt = [said(role, text()) for role in roles.split()]
        more = [{}, {}]
        for side in more:
            side |= {"reasoning_content": text().strip()} if rng.random() < 0.3 else {}
        answers = [
            text() if rng.random() < 0.8 else f"<think>\n{text().strip()}\n</think>\n\n{text()}" for _ in more
        ]
        return Pair(index, tuple(prompt), *answers, chosen_with=more[0], rejected_with=more[1])

    kept = 0
    for made, found in encoder.encode(map(pair, range(300))):
        if isinstance(found, str):
            assert found in ("prompt_text_lost", "template_refuses", "reasoning")
            continue
        kept += 1
        prompt = tokenizer.decode(found.prompt)
        for turn in made.prompt:
            assert prompt.count(turn["content"].strip()) == 1
        for ids, (answer, more) in zip(found[2:], made.answers(), strict=True):
            spoken = tokenizer.decode(ids)
            for part in [*re.findall(r"text \d+ end", answer), *more.values()]:
                assert spoken.count(part) == 1
            assert (prompt + spoken).count("</think>") <= 1 + prompt[: prompt.rindex("end")].count("</think>")
            assert spoken.endswith(("<|im_end|>", "<|return|>"))
    assert kept > (20 if shape == "last turn alone" else 100)


# ---- an answer is never changed


@pytest.mark.parametrize("answer", ["    return 1\n", "\treturn 1", " Yes", "Yes \n\n", "a\n    b"])
def test_only_the_template_strips_an_answer(answer):
    assert written("chatml", "Why?", chosen=answer)[1] == answer + "<|im_end|>"
    assert written("trims", "Why?", chosen=answer)[1] == answer.strip() + "<|im_end|>"


# ---- clock and limits


def test_a_clock_in_a_template_is_that_of_the_run():
    found = written("date", "Hi", clock=86400 * 365.25 * 40)
    assert "Today is 01 Jan 2010." in found[0] or "Today is 31 Dec 2009." in found[0]


@pytest.mark.parametrize(
    "hostile",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ 'a' * 2000000000 }}",
    ],
    ids=["for ever", "doubles", "two gigabytes"],
)
def test_a_template_that_never_ends_or_takes_all_memory_is_one_sentence(monkeypatch, hostile):
    monkeypatch.setattr(template, "SECONDS", 0.5)
    with pytest.raises(UserError, match="chat template of .* (takes longer than|needs more than)") as caught:
        written(hostile + SHAPES["chatml"], "Hi")
    assert "\n" not in str(caught.value)


# ---- what a model holds


@pytest.fixture
def gpt2():
    config = transformers.GPT2Config(vocab_size=200, n_positions=32, n_embd=8, n_layer=1, n_head=1)
    return transformers.GPT2LMHeadModel(config)


def filed(*sides):
    from lazyorpo_lib.orpo.batching import EncodedPair

    file = PairFile()
    file.append(EncodedPair(0, *sides))
    return file


def test_pairs_beyond_a_models_positions_or_tokens_are_one_sentence(gpt2):
    check_model(filed([1] * 20, [199] * 12, [2]), gpt2)
    with pytest.raises(UserError, match=r"33 tokens, but the model knows 32 positions; set max_tokens to 32"):
        check_model(filed([1] * 20, [2], [2] * 13), gpt2)
    with pytest.raises(UserError, match="writes token 200, but the model has 200"):
        check_model(filed([1], [200], [2]), gpt2)
    gpt2.vision = torch.nn.ModuleDict({"position_embedding": torch.nn.Embedding(4, 8)})
    check_model(filed([1] * 20, [199] * 12, [2]), gpt2)
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    rotary = transformers.LlamaConfig(vocab_size=200, max_position_embeddings=32, **small)
    check_model(filed([1] * 99, [2], [3]), transformers.LlamaForCausalLM(rotary))


def test_limits_that_leave_a_stump_of_most_answers_are_refused():
    rows = [
        (n, {"prompt": f"Why {n}?", "chosen": "Because of it.", "rejected": "No idea."}) for n in range(9)
    ]
    tokenizer = tokenizer_of(SHAPES["chatml"])

    def kept(max_tokens):
        limits = dict(max_prompt_tokens=25, max_tokens=max_tokens, overlong="truncate")
        return list(encode_rows(candidates(rows), Encoder(Template(tokenizer), **limits))[0])

    assert len(kept(42)) == 9
    with pytest.raises(UserError, match="max_tokens is 30 .* raise max_tokens"):
        kept(30)


def test_a_text_that_no_limit_could_hold_is_not_even_tokenized(monkeypatch):
    encoder = Encoder(Template(tokenizer_of(SHAPES["chatml"])), max_prompt_tokens=10, max_tokens=20)
    monkeypatch.setattr(encoder, "_ids", lambda *given, **named: pytest.fail("it was"))
    ((_, found),) = encoder.encode([Pair(0, (said("user", "Hi"),), "a" * 10**5, "b")])
    assert found == "overlong"


def test_the_digest_is_of_the_texts_and_not_of_what_a_clock_wrote():
    rows = [(n, {"prompt": f"Why {n}?", "chosen": "Because.", "rejected": "No."}) for n in range(3)]

    def read(clock, rows=rows):
        template = Template(tokenizer_of(SHAPES["date"]), clock)
        encoder = Encoder(template, max_prompt_tokens=200, max_tokens=400)
        pairs, report = encode_rows(candidates(rows), encoder)
        return [encoded for _, encoded in pairs], report.digest.hexdigest()

    (first, one), (second, other) = read(10**9), read(10**9 + 3 * 86400)
    assert one == other and [pair.prompt for pair in first] != [pair.prompt for pair in second]
    assert read(10**9, [(n, row | {"chosen": "So."}) for n, row in rows])[1] != one
