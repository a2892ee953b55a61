"""How long the pairs are: measured where here, else what is known of the dataset; fetches no rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import expanded
from ..model import load_tokenizer
from ..orpo import data
from ..orpo.batching import EncodedPair
from ..orpo.encoding import encode_rows, prepare_tokenizer
from ..rows.candidates import candidates
from ..rows.dataset import open_rows
from ..rows.template import encoder_of
from ..settings import Settings, settle


@dataclass(frozen=True)
class Lengths:
    """How many pairs, mean tokens of their parts, tokens of the longest pair with its prompt once."""

    pairs: int
    prompt: float
    chosen: float
    rejected: float
    longest: int
    source: str = "the dataset"

    @property
    def mean(self) -> float:
        return self.prompt + self.chosen + self.rejected


def measured_lengths(pairs: Sequence[EncodedPair]) -> Lengths:
    """Measure pairs that are encoded."""
    n = max(len(pairs), 1)
    parts = [sum(len(pair[i]) for pair in pairs) / n for i in (1, 2, 3)]
    return Lengths(len(pairs), *parts, max((pair.tokens() for pair in pairs), default=16))


# Tokens of (prompt, chosen, rejected) in a 49k vocabulary: every tenth, by length, of 300 pairs of
# dpo-mix-7k's sources.
_MIX = [
    (103, 5, 30), (104, 93, 8), (56, 24, 179), (48, 48, 237), (73, 196, 93), (95, 218, 142), (52, 342, 117),
    (484, 73, 5), (481, 109, 6), (480, 68, 76), (277, 129, 278), (100, 187, 436), (657, 15, 116), (63, 575,
    214), (47, 550, 301), (98, 531, 343), (85, 495, 444), (164, 438, 502), (507, 257, 455), (608, 314, 384),
    (48, 647, 703), (732, 384, 345), (739, 414, 386), (891, 314, 446), (775, 351, 584), (1237, 98, 474), (831,
    395, 679), (1180, 411, 525), (1300, 494, 511), (1551, 411, 604),
]  # fmt: skip
_KNOWN = {
    "demo": (264, [(45, 30, 30)]),
    "argilla/dpo-mix-7k": (6750, _MIX),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (60917, _MIX),
    "HuggingFaceH4/ultrafeedback_binarized": (61135, _MIX),
}


def preset_lengths(dataset: str, settings: Settings) -> Lengths:
    """Tell the lengths of a dataset not yet downloaded: its published size, lengths of a sample, under the
    settings' limits. One that is not known is taken for 7,000 pairs as long as argilla/dpo-mix-7k's, and
    `source` says so."""
    name, (settings, _) = dataset.split(":")[0], settle(settings, positions=())
    pairs, sample = _KNOWN.get(name, (7000, _MIX))
    lengths = f"lengths of {name}" if sample is not _MIX else "as long as argilla/dpo-mix-7k's, by a sample"
    source = f"{'known' if name in _KNOWN else 'a guess'}: {pairs:,} pairs, {lengths}"
    kept = []
    for p, c, r in sample:
        if settings.overlong == "truncate":
            p = min(p, settings.max_prompt_tokens)
            kept.append((p, min(c, settings.max_tokens - p), min(r, settings.max_tokens - p)))
        elif p <= settings.max_prompt_tokens and p + max(c, r) <= settings.max_tokens:
            kept.append((p, c, r))
    share = len(kept) / len(sample)
    kept = kept or [(settings.max_tokens // 3,) * 3]
    pairs = round(min(pairs, settings.max_pairs or pairs) * share)
    pairs = max(1, pairs - data.held_out_of(pairs, settings.eval_pairs))
    # Real data has a longer tail than the sample; no pair is longer than two answers that fill the limit.
    longest = min(round(1.25 * max(map(sum, kept))), 2 * settings.max_tokens)
    return Lengths(pairs, *(sum(x) / len(kept) for x in zip(*kept, strict=True)), longest, source)


def lengths_of(settings: Settings) -> Lengths:
    """Measure the settings' pairs where they are on this machine, else tell what is known of them."""
    if not expanded(settings.dataset).is_file():
        return preset_lengths(settings.dataset, settings)
    tokenizer = load_tokenizer(settings.base_model)
    prepare_tokenizer(tokenizer)
    rows = candidates(open_rows(settings.dataset, max_rows=settings.max_pairs), settings.columns)
    pairs, _ = encode_rows(rows, encoder_of(tokenizer, settings))
    return measured_lengths([encoded for _, encoded in pairs])
