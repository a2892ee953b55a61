"""Is it better: held-out figures with intervals over the pairs, answers of base and tuned model side by side.

It trains nothing, draws nothing, writes no file and asks no judge. One model is in memory: the base answers
with the adapter switched off. `kept` is the content of a run's held_out.json.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..errors import UserError
from ..machine import attempt, free_bytes, is_out_of_memory
from ..orpo.body import causal_lm, sizes_of
from .reading import FEWEST

WHEN = ("before", "after")  # training
# The demo set's habit: the answer on the first line, then one line of reason.
DEMO_HABIT = re.compile(r"[^\n]{1,200}\nWhy: [^\n]{1,400}")


def held_out_results(kept: dict, dataset: str) -> dict:
    """Say what the held-out pairs show, for summary.json; {} where they were not measured before and after:
    accuracy_before, accuracy_after; verdict, a sentence; held_out, the `changes`; of the demo habit_before
    and habit_after too, shares of the answers."""
    if not set(WHEN) <= kept.keys():
        return {}
    figures = changes(*(measures(kept, when) for when in WHEN), kept.get("prompt_ids"))
    results = {f"accuracy_{when}": figures["accuracy"][when] for when in WHEN}
    if dataset == "demo":
        results |= {f"habit_{when}": habit_share(kept[when]["answers"]) for when in WHEN}
    return results | {"verdict": verdict(figures, kept["after"]), "held_out": figures}


def answers_side_by_side(kept: dict) -> list[dict[str, str]]:
    """List held-out prompts with both models' answers, [{"prompt", "base", "tuned"}], where both answered."""
    if not set(WHEN) <= kept.keys():
        return []
    rows = zip(kept["prompts"], *(kept[when]["answers"] for when in WHEN), strict=True)
    return [{"prompt": asked, "base": a, "tuned": b} for asked, a, b in rows if None not in (a, b)]


def by_prompt(values: np.ndarray, prompts: Sequence) -> np.ndarray:
    """Sum over the pairs of each prompt: (…, pairs) to (…, prompts)."""
    _, group = np.unique(np.array(prompts), return_inverse=True)
    sums = np.zeros((group.max() + 1, *values.shape[:-1]))
    np.add.at(sums, group, np.moveaxis(values, -1, 0))
    return np.moveaxis(sums, 0, -1)


def interval(values: list[np.ndarray], prompts: list[Sequence], draws: int = 2000) -> tuple[float, float]:
    """Give the 95 % bootstrap interval of the mean over the pairs of several seeds: seeds and prompts are
    drawn with replacement, a prompt with its pairs in all seeds (Owen 2007, the pigeonhole bootstrap).
    `values`: of each seed, (pairs,), NaN is passed over; `prompts`: of each seed, a name for each pair's."""
    seeds, names = len(values), np.concatenate([np.array(some) for some in prompts])
    ends, laid = np.cumsum([0, *map(len, values)]), np.zeros((2, seeds, len(names)))
    for s, some in enumerate(values):
        laid[:, s, ends[s] : ends[s + 1]] = np.nan_to_num(some), np.isfinite(some)
    table = by_prompt(laid, names)
    often = _drawn(seeds, table.shape[-1], draws)
    sums, counts = ((often[0] @ side * often[1]).sum(axis=1) for side in table)
    low, high = np.quantile(sums[counts > 0] / counts[counts > 0], (0.025, 0.975))
    return float(low), float(high)


@lru_cache(maxsize=1)  # a run has many figures of the same pairs
def _drawn(seeds: int, prompts: int, draws: int) -> list[np.ndarray]:
    chance = np.random.default_rng(0)
    return [chance.multinomial(n, [1 / n] * n, draws).astype(np.float32) for n in (seeds, prompts)]


def measures(kept: dict, when: str) -> dict[str, np.ndarray]:
    """Give the figures of the held-out pairs, {name: (pairs,)}; NaN where one does not speak of a pair."""
    columns = dict(zip(kept["columns"], np.array(kept[when]["pairs"], dtype=float).T, strict=True))
    shorter, accuracy = np.array(kept["chosen_shorter"]), columns["accuracy"]
    return {
        "accuracy": accuracy,
        "accuracy_chosen_shorter": np.where(shorter, accuracy, np.nan),
        "accuracy_chosen_longer": np.where(~shorter, accuracy, np.nan),
        "log_odds_chosen": columns["log_odds_chosen"],
        "log_odds_rejected": columns["log_odds_rejected"],
        "log_odds_ratio": columns["log_odds_chosen"] - columns["log_odds_rejected"],
        "nll": columns["nll"] / columns["nll_tokens"],
    }


def changes(before: dict[str, np.ndarray], after: dict[str, np.ndarray], prompts=None) -> dict[str, dict]:
    """Take the change of each figure pair by pair, so that what pairs have in common cancels: {figure:
    {pairs, prompts, before, after, change, each with …_interval, more_than_noise}}. `prompts`: a name for the
    prompt of each pair; else all differ."""
    out = {}
    for name, b in before.items():
        a = after[name]
        if not (known := np.isfinite(a - b)).any():
            continue
        names = np.arange(len(b)) if prompts is None else np.array(prompts)
        figure = {"pairs": int(known.sum()), "prompts": len(set(names[known].tolist()))}
        for when, values in (("before", b), ("after", a), ("change", a - b)):
            values = np.where(known, values, np.nan)
            figure |= {when: float(np.nanmean(values)), f"{when}_interval": interval([values], [names])}
        low, high = figure["change_interval"]
        out[name] = figure | {"more_than_noise": figure["prompts"] >= FEWEST and (low > 0 or high < 0)}
    return out


def verdict(figures: dict[str, dict], after: dict | None = None) -> str:
    """Put the held-out result into one sentence: `figures` are `changes`, `after` what was kept then."""
    c = figures["accuracy"]
    low, high = c["change_interval"]
    said = "more than noise"
    if why := broken(figures, after or {}):
        said = f"no gain all the same, for {why}: try a lower learning_rate or or_weight"
    elif not c["more_than_noise"]:
        said = "within the noise of so few pairs: hold out more, or train longer"
    return (
        f"Held-out accuracy {c['before']:.0%} -> {c['after']:.0%} on {c['pairs']} pairs "
        f"(change {c['change']:+.0%}, 95 % interval {low:+.0%} to {high:+.0%}): {said}."
    )


def broken(figures: dict[str, dict], after: dict) -> str:
    """Say why no gain may be told of a model whose likelihoods or answers fell to pieces; "" of a sound one.

    A nll that rose by three nats, or that more than doubled and one more, is that of a model which no longer
    knows its language: from 2.5 to 5.5 nats, where guessing among 32,000 tokens has 10.
    """
    if any(None in row for row in after.get("pairs", ())):
        return "its loss is no longer a number"
    nll = figures.get("nll", {"before": 0.0, "after": 0.0})
    if nll["after"] - nll["before"] > min(3, nll["before"] + 1):
        return f"its nll went from {nll['before']:.3g} to {nll['after']:.3g} nats per token"
    texts = [text for text in after.get("answers", ()) if text is not None]
    idle = sum(map(_says_nothing, texts))
    if idle > len(texts) / 2:
        return f"{idle} of its {len(texts)} answers are empty or one piece again and again"
    return ""


def _says_nothing(text: str) -> bool:
    """Tell whether an answer is empty, or, a long one from its middle on, one piece again and again."""
    text = text.removesuffix("…").strip()
    part = text[len(text) // 2 :] if len(text) > 15 else text
    sizes = range(1, min(24, len(part) // 3) + 1) if len(text) > 3 else ()
    return not text or any(part[n:] == part[:-n] for n in sizes)


def habit_share(texts: Sequence[str | None]) -> float:
    """Give the share of answers with the demo set's habit: one line, then one that begins with "Why:"."""
    texts = [text for text in texts if text is not None]
    return sum(bool(DEMO_HABIT.fullmatch(text)) for text in texts) / max(len(texts), 1)


def answers(
    model, tokenizer, prompts: Sequence[Sequence[int]], *, max_tokens: int, end_ids: Sequence[int],
    batch_size: int = 64, on_batch: Callable[[int], None] = lambda done: None,
    draw: Callable[[list[int]], LogitsProcessor] | None = None,
    note: Callable[[str], None] | None = None, **sampling,
) -> list[str | None]:  # fmt: skip
    """Generate answers, greedy unless told otherwise, in the order of the prompts.

    Args:
        prompts: token ids, from `Encoder.prompt_ids`. max_tokens: longest answer; a cut one ends in "…".
        end_ids: tokens that end an answer. on_batch: told how many answers are done since the last call.
        batch_size: most prompts at once; fewer where their cache would take a quarter of the free memory.
        draw: makes what changes the scores of the prompts at some positions, for each batch anew.
        note: told why a prompt that alone takes too much memory is left out, its answer None; else UserError.
        sampling: what generate() takes, as do_sample, temperature, top_p; for a single prompt a streamer.
    """
    training, weight = model.training, model.get_input_embeddings().weight
    model.eval()
    texts: dict[int, str | None] = dict.fromkeys(range(len(prompts)))
    room = free_bytes(weight.device) // 4 // cache_bytes(model.config, weight.element_size())
    options = dict(max_new_tokens=max_tokens, eos_token_id=list(end_ids), **sampling)
    waiting = [sorted(texts, key=lambda i: len(prompts[i]))] if texts else []  # alike: little padding
    while waiting:
        some, message = waiting.pop(), "too many at once"
        most = min(batch_size, room // (len(prompts[some[-1]]) + max_tokens))
        if len(some) <= max(most, 1):
            options["logits_processor"] = LogitsProcessorList([draw(some)] if draw else [])
            rows, message = attempt(partial(_generate, model, tokenizer, [prompts[i] for i in some], options))
        if message and len(some) > 1:
            waiting += [some[len(some) // 2 :], some[: len(some) // 2]]
            continue
        if message and not note:
            why = f"Out of memory in answering a single prompt ({message})"
            raise UserError(f"{why}; lower max_prompt_tokens.")
        if message:
            note(message)
        texts |= zip(some, (_text(tokenizer, row, end_ids) for row in rows or ()), strict=False)
        on_batch(len(some))
    model.train(training)
    clear_device_cache()  # training's rows have no use for pieces of a growing cache
    return list(texts.values())


def end_ids(model, tokenizer, *more: int) -> list[int]:
    """List the tokens that end an answer: the tokenizer's, the model's own, and `more`."""
    own = causal_lm(model).generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), *more} - {None})


def cache_bytes(config, itemsize: int) -> int:
    """Count the bytes of keys and values, `itemsize` a number, that a token leaves in a model's cache."""
    usual = {"num_attention_heads": 1, "num_hidden_layers": 1, "hidden_size": 64}
    heads, layers, size = (max(sizes_of(config, name), default=value) for name, value in usual.items())
    groups = max(sizes_of(config, "num_key_value_heads"), default=heads)
    return 2 * layers * groups * max(sizes_of(config, "head_dim"), default=size // heads) * itemsize


@torch.no_grad()
def _generate(model, tokenizer, prompts: Sequence[Sequence[int]], options: dict) -> list[list[int]]:
    device, width = model.get_input_embeddings().weight.device, max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else options["eos_token_id"][0]
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    given = dict(input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device))
    lm = causal_lm(model)
    own, lm.generation_config = lm.generation_config, GenerationConfig(do_sample=False)
    written = partial(model.generate, **given, pad_token_id=pad, **options)
    try:  # greedy, whatever the model's own settings are, with which generate() would fill what is not given
        return written(use_cache=True)[:, width:].tolist()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return written(use_cache=False)[:, width:].tolist()  # some classes have no cache that works
    finally:
        lm.generation_config = own


def _text(tokenizer, row: Sequence[int], end_ids: Sequence[int]) -> str:
    length = next((k for k, token in enumerate(row) if token in end_ids), None)
    return tokenizer.decode(row[:length], skip_special_tokens=True).strip() + "…" * (length is None)
