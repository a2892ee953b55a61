"""Whatever the texts hold: a pair is encoded to what decodes to its answers and their ends, or refused with a
known reason.

1,500 generated cases; with PROPERTY_SCALE=10 in the environment ten times as many.
"""

from hypothesis import given
from hypothesis import strategies as st

from lazyorpo_lib.orpo.batching import EncodedPair
from lazyorpo_lib.orpo.data import Pair
from lazyorpo_lib.orpo.encoding import Encoder, prepare_tokenizer
from lazyorpo_lib.rows.template import Template
from tests.orpo.test_data_properties import ODD, cases
from tests.orpo.test_encoding import TOKENIZERS

KINDS = [
    kind for kind in TOKENIZERS if kind not in ("slow", "metaspace, Llama-2's template")
]  # these two know few characters
NEVER_REFUSE = ("chatml", "chatml, eos of another kind", "no template", "pad is eos")
REASONS = {
    "template_refuses", "no_end_token", "special_token_text", "tokens_cross_the_border", "empty_prompt",
    "overlong",
    "identical_after_encoding", "prompt_text_lost",
}  # fmt: skip
SPECIAL = [
    "</s>",
    "<s>",
    "<|im_start|>user\nHi<|im_end|>",
    "a</s>b",
    "<|im_end|>\n<|im_start|>assistant\n",
    "Hi <|im_end|> there",
]
text = st.sampled_from(
    [t for t in ODD if t.isprintable()] + SPECIAL + ["Hi", "A", "a b", "[/INST] x", "¶ <think></think>"]
)
text |= st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
answer = text.map(str.strip).filter(bool)
turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), text), max_size=2)
encoders = {}


def encoder_of(kind):
    if kind not in encoders:
        tokenizer = TOKENIZERS[kind]()
        prepare_tokenizer(tokenizer)
        encoders[kind] = Encoder(Template(tokenizer), max_prompt_tokens=300, max_tokens=400)
    return encoders[kind]


@cases(1500)
@given(st.sampled_from(KINDS), turns, text, answer, answer)
def test_what_is_scored_decodes_to_the_answer_and_its_end_or_there_is_a_reason(
    kind, head, question, chosen, rejected
):
    encoder = encoder_of(kind)
    prompt = [{"role": role, "content": content} for role, content in [*head, ("user", question)]]
    ((_, found),) = encoder.encode([Pair(0, tuple(prompt), chosen, rejected)])
    if not isinstance(found, EncodedPair):
        assert found in REASONS
        assert kind not in NEVER_REFUSE or found == "overlong" or chosen == rejected
        return
    tokenizer = encoder.tokenizer
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    assert len(found.prompt) <= 300 and len(found.prompt) + max(len(found.chosen), len(found.rejected)) <= 400
    for ids, said in ((found.chosen, chosen), (found.rejected, rejected)):
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip().startswith(said)
        if ids[-1] in special:  # ends with a token of its own, which nothing in the text can be mistaken for
            assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False).strip() == said
            assert not special & set(ids[:-1])
    asked = tokenizer.decode(found.prompt, clean_up_tokenization_spaces=False)
    assert question.strip() in asked
