"""Is it better: figures on held-out pairs with intervals over the pairs, and answers of base and tuned model side by side.

It trains nothing, draws nothing, and asks no judge. One model is in memory: the base answers with the adapter switched off.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from ..errors import UserError
from ..machine import attempt, free_bytes

DEMO_HABIT = re.compile(
    r"[^\n]{1,200}\nWhy: [^\n]{1,400}"
)  # of the demo set: the answer, then one line of reason


def interval(values: np.ndarray, *, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, over pairs drawn with replacement. `values`: (pairs,)."""
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def measures(kept: dict, when: str) -> dict[str, np.ndarray]:
    """Figures of each held-out pair by name, each (pairs,); a pair that a figure does not speak of is NaN.

    Args:
        kept: the content of a run's held_out.json.
        when: "before" or "after" training.
    """
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


def compare(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, dict]:
    """{figure: {pairs, before, before_interval, after, after_interval, change, change_interval, more_than_noise}};
    the change is taken pair by pair, so that what pairs have in common cancels."""
    out = {}
    for name in before:
        keep = ~np.isnan(before[name])
        if not keep.any():
            continue
        b, a = before[name][keep], after[name][keep]
        low, high = interval(a - b)
        out[name] = {
            "pairs": int(keep.sum()),
            "before": float(b.mean()),
            "before_interval": interval(b),
            "after": float(a.mean()),
            "after_interval": interval(a),
            "change": float((a - b).mean()),
            "change_interval": (low, high),
            "more_than_noise": bool(low > 0 or high < 0),
        }
    return out


def verdict(comparison: dict[str, dict]) -> str:
    """The held-out result in one sentence."""
    c = comparison["accuracy"]
    low, high = c["change_interval"]
    words = (
        "more than noise"
        if c["more_than_noise"]
        else "within the noise of so few pairs: hold out more, or train longer"
    )
    return (
        f"Held-out accuracy {c['before']:.0%} -> {c['after']:.0%} on {c['pairs']} pairs "
        f"(change {c['change']:+.0%}, 95 % interval {low:+.0%} to {high:+.0%}): {words}."
    )


def answers(
    model, tokenizer, prompts: Sequence[Sequence[int]], *, max_tokens: int, end_ids: Sequence[int],
    batch_size: int = 64, on_batch: Callable[[int], None] = lambda done: None, streamer=None,
) -> list[str]:  # fmt: skip
    """Greedy answers, in the order of the prompts.

    Args:
        prompts: token ids, from `Encoder.prompt_ids`.
        max_tokens: longest answer; one that is cut there lacks its end and is given with "…".
        end_ids: tokens that end an answer.
        batch_size: most prompts at once; fewer where their cache would take over a quarter of the free memory.
        streamer: one of transformers', for a single prompt.

    Raises:
        UserError: memory runs out on a single prompt.
    """
    training, weight = model.training, model.get_input_embeddings().weight
    model.eval()
    texts: dict[int, str] = {}
    order = sorted(
        range(len(prompts)), key=lambda i: len(prompts[i])
    )  # like lengths together: little padding
    room = free_bytes(weight.device) // 4 // cache_bytes(model.config, weight.element_size())
    waiting = _batches(order, [len(p) + max_tokens for p in prompts], room, batch_size)[::-1]
    options = dict(max_new_tokens=max_tokens, eos_token_id=list(end_ids), streamer=streamer)
    while waiting:
        some = waiting.pop()
        rows, message = attempt(partial(_generate, model, tokenizer, [prompts[i] for i in some], options))
        if not message:
            texts |= {i: _text(tokenizer, row, end_ids) for i, row in zip(some, rows, strict=True)}
            on_batch(len(some))
        elif len(some) > 1:
            waiting += [some[len(some) // 2 :], some[: len(some) // 2]]
        else:
            raise UserError(
                f"Out of memory in answering a single prompt ({message}); lower max_prompt_tokens."
            )
    model.train(training)
    clear_device_cache()  # training's rows have no use for pieces of a growing cache
    return [texts[i] for i in range(len(prompts))]


def cache_bytes(config, itemsize: int) -> int:
    """Count the bytes of keys and values, `itemsize` for each number, that a token leaves in a model's cache."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return (
        2
        * text.num_hidden_layers
        * (getattr(text, "num_key_value_heads", None) or heads)
        * head_dim
        * itemsize
    )


def _batches(order: Sequence[int], tokens: Sequence[int], room: int, most: int) -> list[list[int]]:
    """Deal `order`, shortest first, into batches of at most `most` members and `room` tokens with padding."""
    batches: list[list[int]] = []
    for i in order:
        if not batches or len(batches[-1]) == most or (len(batches[-1]) + 1) * tokens[i] > room:
            batches.append([])
        batches[-1].append(i)
    return batches


@torch.no_grad()
def _generate(model, tokenizer, prompts: Sequence[Sequence[int]], options: dict) -> list[list[int]]:
    device, width = model.get_input_embeddings().weight.device, max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else options["eos_token_id"][0]
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, temperature=None, top_p=None, top_k=None, use_cache=True,
        pad_token_id=pad, **options,
    )  # fmt: skip
    return out[:, width:].tolist()


def _text(tokenizer, row: Sequence[int], end_ids: Sequence[int]) -> str:
    length = next((k for k, token in enumerate(row) if token in end_ids), None)
    text = tokenizer.decode(row[:length], skip_special_tokens=True).strip()
    return text if length is not None else text + "…"


def habit_share(texts: Sequence[str]) -> float:
    """Share of answers with the demo set's habit: the answer on the first line, then one line that begins with "Why:"."""
    return sum(bool(DEMO_HABIT.fullmatch(text)) for text in texts) / max(len(texts), 1)
