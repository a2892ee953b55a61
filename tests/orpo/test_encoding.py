"""What is scored decodes to the answer and its end, for a dozen kinds of tokenizer; what cannot be is
refused."""

import pickle

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace
from tokenizers.normalizers import Sequence as Normalizers

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo.data import Pair
from lazyorpo_lib.orpo.encoding import Encoder, PairFile, Subset, prepare_tokenizer
from lazyorpo_lib.rows.template import Template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n--\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = CHATML.replace(
    "{{ m['role'] }}\n", "{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think></think>\n\n{% endif %}"
)
NO_GENERATION_PROMPT = CHATML.split("{% if add")[0]


def byte_tokenizer(
    template=None, merges=(), special=("<s>", "</s>"), bos="<s>", eos="</s>", pad=None, adds_bos=False
):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    extra = [a + b for a, b in merges]
    every = list(dict.fromkeys([*special, "<|im_start|>", "<|im_end|>"]))
    core = Tokenizer(BPE(vocab={t: i for i, t in enumerate(every + alphabet + extra)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in every])
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad
    )
    tokenizer.chat_template = template
    return tokenizer


def metaspace_tokenizer(template):
    """Like Llama-2's: a space is put before every text, and ▁ stands for spaces."""
    characters = [chr(c) for c in range(33, 127)] + ["▁", "\n"]
    merges = [("▁", "H"), ("▁", "A"), ("▁H", "i")]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *characters, *[a + b for a, b in merges]])}
    core = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True))
    core.normalizer = Normalizers([Prepend("▁"), Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


class SlowTokenizer(transformers.PreTrainedTokenizer):
    """A tokenizer written in Python: one token a character."""

    def __init__(self, **kwargs):
        self._vocab = {
            "<s>": 0,
            "</s>": 1,
            **{chr(c): i for i, c in enumerate([10, *range(32, 127)], start=2)},
        }
        super().__init__(bos_token="<s>", eos_token="</s>", **kwargs)

    def get_vocab(self):
        return dict(self._vocab)

    @property
    def vocab_size(self):
        return len(self._vocab)

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return self._vocab.get(token, 0)

    def _convert_id_to_token(self, index):
        return next(t for t, i in self._vocab.items() if i == index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


TOKENIZERS = {
    "no template": lambda: byte_tokenizer(),
    "no template, adds bos": lambda: byte_tokenizer(adds_bos=True),
    "pad is eos": lambda: byte_tokenizer(pad="</s>"),
    "no bos": lambda: byte_tokenizer(bos=None),
    "chatml": lambda: byte_tokenizer(CHATML, eos="<|im_end|>"),
    "chatml, eos of another kind": lambda: byte_tokenizer(CHATML),
    "template and tokenizer add bos": lambda: byte_tokenizer("{{ bos_token }}" + CHATML, adds_bos=True),
    "no system turn (Llama-2)": lambda: byte_tokenizer(LLAMA2),
    "metaspace, Llama-2's template": lambda: metaspace_tokenizer(LLAMA2),
    "turns must alternate": lambda: byte_tokenizer(ALTERNATING),
    "strips and adds text after": lambda: byte_tokenizer(PLAIN_END),
    "adds text before the answer": lambda: byte_tokenizer(THINKING),
    "no generation prompt": lambda: byte_tokenizer(NO_GENERATION_PROMPT),
    "merges across the border": lambda: byte_tokenizer(ALTERNATING, merges=[(">", "H"), (">", "A")]),
    "slow": lambda: SlowTokenizer(),
}  # fmt: skip
TURNS = {
    "one turn": [{"role": "user", "content": "Say hi"}],
    "with a system turn": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say hi"}],
    "two user turns in a row": [
        {"role": "user", "content": "Say hi"},
        {"role": "user", "content": "Please."},
    ],
    "several turns": [
        {"role": "user", "content": "Yes?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Hm"},
    ],
}


def encode(tokenizer, prompt, chosen="Hi there.", rejected="Away!", **limits):
    prepare_tokenizer(tokenizer)
    encoder = Encoder(Template(tokenizer), **(dict(max_prompt_tokens=400, max_tokens=800) | limits))
    ((_, encoded),) = encoder.encode([Pair(0, tuple(prompt), chosen, rejected)])
    return encoder, encoded


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_scored_tokens_decode_to_the_answer_and_its_end(kind, turns):
    tokenizer = TOKENIZERS[kind]()
    _, pair = encode(tokenizer, TURNS[turns])
    assert not isinstance(pair, str), pair
    ends = {"<|im_end|>"} if "<|im_end|>" in (tokenizer.chat_template or "") else {tokenizer.eos_token}
    for ids, text in ((pair.chosen, "Hi there."), (pair.rejected, "Away!")):
        assert tokenizer.decode(ids[-1:]) in ends
        assert tokenizer.decode(ids[:-1]).strip() == text
        assert tokenizer.decode(ids).count(tokenizer.decode(ids[-1:])) == 1


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_prompt_is_what_the_model_answers_from(kind):
    tokenizer = TOKENIZERS[kind]()
    encoder, pair = encode(tokenizer, TURNS["several turns"])
    assert encoder.prompt_ids(TURNS["several turns"])[: len(pair.prompt)] == list(pair.prompt)
    text = tokenizer.decode(pair.prompt)
    assert "Hm" in text and "Hi there." not in text
    if tokenizer.bos_token and tokenizer.bos_token != "<|im_start|>":
        assert list(pair.prompt).count(tokenizer.bos_token_id) <= sum(
            t["role"] == "user" for t in TURNS["several turns"]
        )


def test_a_base_models_default_template_begins_with_bos_once_where_the_tokenizer_adds_it():
    tokenizer = byte_tokenizer(adds_bos=True)
    _, pair = encode(tokenizer, TURNS["one turn"])
    assert pair.prompt[0] == tokenizer.bos_token_id and list(pair.prompt).count(tokenizer.bos_token_id) == 1
    assert byte_tokenizer().bos_token_id not in encode(byte_tokenizer(), TURNS["one turn"])[1].prompt


@pytest.mark.parametrize("kind", ["chatml", "no template", "no system turn (Llama-2)", "slow"])
@pytest.mark.parametrize("where", ["prompt", "chosen", "both"])
def test_special_token_text_never_becomes_a_special_token(kind, where):
    tokenizer = TOKENIZERS[kind]()
    evil = "Look: <|im_end|> </s> <s> !"
    turns = [{"role": "user", "content": evil if where != "chosen" else "Say hi"}]
    _, pair = encode(tokenizer, turns, chosen=evil if where != "prompt" else "Hi there.")
    if isinstance(pair, str):
        assert pair == "special_token_text"  # a clear refusal
        return
    _, harmless = encode(TOKENIZERS[kind](), TURNS["one turn"], chosen="Hi there.")
    special = set(tokenizer.all_special_ids) | {
        i for i, t in tokenizer.added_tokens_decoder.items() if t.special
    }
    for side in ("prompt", "chosen", "rejected"):
        marks = [i for i in getattr(pair, side) if i in special]
        assert marks == [i for i in getattr(harmless, side) if i in special], side
    if where != "prompt":
        assert "<|im_end|> </s> <s>" in tokenizer.decode(pair.chosen[:-1]).replace("  ", " ")


def test_a_tokenizer_that_can_end_no_answer_is_refused():
    with pytest.raises(UserError, match="end-of-sequence"):
        prepare_tokenizer(byte_tokenizer(eos=None))


def test_a_template_that_ends_no_answer_without_an_eos_is_refused_for_each_pair():
    assert encode(byte_tokenizer(PLAIN_END, eos=None), TURNS["one turn"])[1] == "no_end_token"


def test_a_template_that_refuses_every_form_is_a_reason_and_not_a_crash():
    assert (
        encode(byte_tokenizer("{{ raise_exception('never') }}"), TURNS["one turn"])[1] == "template_refuses"
    )


def test_overlong_pairs_are_dropped_or_truncated_as_asked():
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    prompt = [{"role": "user", "content": "x" * 100 + "END"}]
    limits = dict(max_prompt_tokens=40, max_tokens=50)
    assert encode(tokenizer, prompt, **limits)[1] == "overlong"
    _, pair = encode(tokenizer, prompt, chosen="c" * 60, rejected="r", overlong="truncate", **limits)
    assert len(pair.prompt) == 40 and tokenizer.decode(pair.prompt).endswith("assistant\n")
    assert "END" in tokenizer.decode(pair.prompt)  # the prompt loses its left
    assert len(pair.chosen) == 10 and tokenizer.decode(pair.chosen) == "c" * 9 + "<|im_end|>"
    assert tokenizer.decode(pair.rejected) == "r<|im_end|>"


def test_truncation_keeps_an_answer_token_and_its_end_however_tight():
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    limits = dict(max_prompt_tokens=30, max_tokens=31, overlong="truncate")
    _, pair = encode(
        tokenizer, [{"role": "user", "content": "y" * 50}], chosen="abc", rejected="xyz", **limits
    )
    assert tokenizer.decode(pair.chosen) == "a<|im_end|>" and len(pair.prompt) + len(pair.chosen) == 31


def test_answers_that_are_cut_to_the_same_text_are_dropped():
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    limits = dict(max_prompt_tokens=60, max_tokens=62, overlong="truncate")
    prompt = [{"role": "user", "content": "y" * 100}]
    assert (
        encode(tokenizer, prompt, chosen="a one", rejected="a two", **limits)[1] == "identical_after_encoding"
    )


def test_pairs_on_disk_come_back_as_they_went(pairs):
    file = PairFile()
    for pair in pairs:
        file.append(pair)
    assert [tuple(map(list, p[1:])) for p in file] == [tuple(map(list, p[1:])) for p in pairs]
    assert list(file.lengths) == [p.tokens() for p in pairs]
    some = Subset(file, [3, 1])
    assert [p.index for p in some] == [3, 1] and list(some.lengths) == [pairs[3].tokens(), pairs[1].tokens()]
    assert file.lengths_of_sides()["chosen"].tolist() == [len(p.chosen) for p in pairs]


def test_pairs_in_a_file_with_a_name_are_found_by_who_gets_a_pickle_and_outlive_the_name(pairs, tmp_path):
    file = PairFile(tmp_path / "pairs")
    for pair in pairs:
        file.append(pair)
    some, again = pickle.loads(pickle.dumps([Subset(file, [3, 1]), file]))
    (tmp_path / "pairs").unlink()
    assert some.dataset is again and list(again) == list(file) and list(again.lengths) == list(file.lengths)
    assert again.highest == file.highest and [p.index for p in some] == [3, 1]
