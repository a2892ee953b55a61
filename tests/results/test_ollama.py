"""ollama.py: what Ollama would write from a Modelfile is what the chat template writes, or there is none."""

import re

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo.encoding import prepare_tokenizer
from lazyorpo_lib.results import ollama

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are SmolLM, a helpful \"assistant\"."
    "<|im_end|>\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_DATED = (
    "{{ bos_token }}{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: "
    "{{ strftime_now('%d %b %Y') }}\n\n{{ s }}<|eot_id|>"
    + LLAMA.replace("{{ bos_token }}", "").replace("in messages", "in messages if m.role != 'system'")
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA_3 = (
    "{{ bos_token }}{% set first = '' %}{% set talk = messages %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set talk = messages[1:] %}{% endif %}"
    "{% for m in talk %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_3 = (  # the system text goes with the last turn, and a space is the answer's
    "{{ bos_token }}{% set talk = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for m in talk %}{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content | trim }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
PHI_4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
FAMILIES = {
    "Llama-3": LLAMA, "Llama-3.2": LLAMA_DATED, "Qwen": DEFAULT_SYSTEM.replace("SmolLM", "Qwen") + CHATML,
    "ChatML": CHATML, "SmolLM2": DEFAULT_SYSTEM + CHATML, "Gemma-2": GEMMA, "Gemma-3": GEMMA_3,
    "Mistral": MISTRAL, "Mistral-0.3": MISTRAL_3, "Phi-3": PHI_3, "Phi-4": PHI_4, "the kit's own": None,
}  # fmt: skip
UNUSUAL = {
    "numbers its turns": "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}{% endfor %}",
    "the last turn alone": "user: {{ messages[-1].content }}\nassistant:",
    "says all twice": "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ m.content }}{% endfor %}",
    "looks at the text": "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}",
    "raises at anything": "{{ raise_exception('no') }}",
    "never ends": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "writes what Go would read": CHATML.replace("<|im_end|>", "{{ '{{ .Think }}' }}"),
    "is long only now and then": (
        "{% if messages | length > 4 %}much said. {% endif %}" + CHATML.replace("message[", "message[")
    ),
}


def tokenizer_of(template, *, adds_bos=False):
    """A tokenizer over bytes with that chat template; None: with the kit's own."""
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"]
    vocabulary = {t: i for i, t in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = template
    prepare_tokenizer(made)
    return made


# The part of Go's text/template that a Modelfile of ours uses.


def go(text, values):
    """What Go's text/template writes of a text; anything that is not in this part of it is an error."""
    tokens = re.split(r"\{\{ (.*?) \}\}", text)
    nodes = [("text", t) if i % 2 == 0 else ("do", t) for i, t in enumerate(tokens)]
    out, rest = block(nodes, values, values, {})
    assert rest == []
    return out


def block(nodes, dot, root, names, shown=True):
    """The output of nodes up to the end, or the else, that is theirs; and what follows."""
    out = ""
    while nodes:
        (kind, said), *nodes = nodes
        if kind == "text":
            out += said * shown
        elif said == "end" or said.startswith("else"):
            return out, [(kind, said), *nodes]
        elif found := re.fullmatch(r"range \$i, \$_ := (.+)", said):
            items = value(found[1], dot, root, names) if shown else []
            for number, item in enumerate(items):
                part, after = block(nodes, item, root, names | {"$i": number})
                out += part
            _, nodes = block(nodes, {}, root, names, False) if not items else ("", after)
            assert nodes.pop(0) == ("do", "end")
        elif said.startswith("if "):
            part, nodes = branches(said, nodes, dot, root, names, shown)
            out += part
        elif found := re.fullmatch(r"(\$\w+) := (.+)", said):
            names = names | {found[1]: value(found[2], dot, root, names) if shown else None}
        else:
            out += value(said, dot, root, names) if shown else ""
    return out, []


def branches(said, nodes, dot, root, names, shown):
    out, taken = "", not shown
    while said != "end":
        said = said.removeprefix("else").strip()
        yes = not taken and (not said or bool(value(said.removeprefix("if "), dot, root, names)))
        part, nodes = block(nodes, dot, root, names, yes)
        out, taken = out + part, taken or yes
        (_, said), *nodes = nodes
    return out, nodes


def value(said, dot, root, names):
    if found := re.fullmatch(r"eq \(len \(slice (.+) (.+)\)\) 1", said):
        items, start = (value(part, dot, root, names) for part in found.groups())
        return len(items[start:]) == 1
    if found := re.fullmatch(r"(eq|and) (\S+) (\S+)", said):
        one, other = (value(part, dot, root, names) for part in found.groups()[1:])
        return one == other if found[1] == "eq" else one and other
    if found := re.fullmatch(r"not (\S+)", said):
        return not value(found[1], dot, root, names)
    if said.startswith('"'):
        return said[1:-1]
    if said.startswith("$."):
        return root[said[2:]]
    return names[said] if said.startswith("$") else dot[said.removeprefix(".")]


def by_ollama(modelfile, talk):
    """What Ollama gives a model: system turns are joined into .System, and stay among the .Messages."""
    template = re.search(r'TEMPLATE """(.*)"""', modelfile, re.DOTALL)[1]
    messages = [{"Role": role, "Content": text} for role, text in talk]
    system = "\n\n".join(text for role, text in talk if role == "system")
    return go(template, {"System": system, "Messages": messages})


TALKS = {
    "a question": [("user", "How does it end?")],
    "with a system text": [("system", "You're a \"pirate\"."), ("user", "Hi {{ you }}")],
    "three turns": [
        ("user", "One"), ("assistant", "two\nlines"), ("user", "3"), ("assistant", "4"), ("user", "5"),
    ],
    "three turns with a system text": [
        ("system", "Speak 漢."), ("user", "One"), ("assistant", "2"), ("user", "3"), ("assistant", "4"),
        ("user", "5"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("adds_bos", [False, True], ids=["", "adds its first token itself"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ollama_writes_what_the_chat_template_writes(family, adds_bos, talk):
    tokenizer = tokenizer_of(FAMILIES[family], adds_bos=adds_bos)
    made = ollama.modelfile(tokenizer, [2])
    messages = [{"role": role, "content": text} for role, text in talk]
    if family in ("Gemma-2", "Mistral") and talk[0][0] == "system":  # as in training, with the first turn
        messages = [{"role": "user", "content": f"{talk[0][1]}\n\n{talk[1][1]}"}, *messages[2:]]
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    first = "<s>" if adds_bos and wanted.startswith("<s>") else ""
    assert first + by_ollama(made, talk) == wanted


@pytest.mark.parametrize("kind", UNUSUAL)
def test_a_template_that_is_not_of_one_text_between_turns_gets_no_modelfile(kind):
    assert ollama.modelfile(tokenizer_of(UNUSUAL[kind]), [2]) == ""


def test_a_modelfile_starts_from_its_folder_and_stops_at_the_ends_of_answer_and_turn():
    made = ollama.modelfile(tokenizer_of(CHATML), [2])
    assert re.search(r"^FROM \.$", made, re.M)
    assert re.findall(r'^PARAMETER stop "(.*)"$', made, re.M) == ["</s>", "<|im_end|>"]


@pytest.mark.parametrize("name", ["my-model", "me/my-model", "a.b_c:v2", "host.com/me/x:1"])
def test_names_that_ollama_takes_pass(name):
    ollama.check_name(name)


@pytest.mark.parametrize(
    "name", ["", "a b", "a/b/c/d", "é", "a:b:c", "../x", "a//b", "-x y", "x" * 200, "a;rm"]
)
def test_a_name_that_is_none_is_one_sentence(name):
    with pytest.raises(UserError, match="no name of a model in Ollama: give"):
        ollama.check_name(name)
