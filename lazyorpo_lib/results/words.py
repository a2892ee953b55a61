"""What style alone is worth: a bag of words that ranks two answers without the prompt.

The bar for an accuracy: a logistic regression on the words, and pairs of words, in which the two answers
differ; fitted on the training pairs, tested on the held-out ones.
"""

import re
import zlib
from collections.abc import Iterable

import numpy as np

FEATURES, WORDS, PAIRS = 2**17, 400, 8000  # hashed features; words of an answer, pairs that are looked at


class BagOfWords:
    """Holds what the two answers of each of the first pairs differ in; `accuracy` fits and tests."""

    def __init__(self):
        self.rows: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, chosen: str, rejected: str) -> None:
        """Take in the two answers of the next pair."""
        if len(self.rows) < PAIRS:
            better, worse = _features(chosen), _features(rejected)
            ids = np.array(sorted(better ^ worse), dtype=np.int64)
            signs = np.array([1.0 if i in better else -1.0 for i in ids.tolist()], dtype=np.float32)
            self.rows.append((ids, signs / max(1.0, np.sqrt(len(ids)))))

    def accuracy(self, train: Iterable[int], held_out: Iterable[int]) -> float | None:
        """Give the share of held-out pairs, by their positions, that words rank right; None with too few."""
        train, held_out = ([i for i in some if i < len(self.rows)] for some in (train, held_out))
        if len(train) < 20 or not held_out:
            return None
        ids, values = map(np.concatenate, zip(*(self.rows[i] for i in train), strict=True))
        owners = np.repeat(np.arange(len(train)), [len(self.rows[i][0]) for i in train])
        weights, speed = np.zeros(FEATURES), np.zeros(FEATURES)
        for _ in range(120):  # gradient descent with momentum on the logistic loss and a little decay
            ahead = weights + 0.9 * speed
            margins = np.bincount(owners, weights=values * ahead[ids], minlength=len(train))
            pull = 1 / (1 + np.exp(np.clip(margins, -30, 30)))
            slope = np.bincount(ids, weights=values * pull[owners], minlength=FEATURES) / len(train)
            speed = 0.9 * speed + 4.0 * (slope - 1e-4 * ahead)
            weights = weights + speed
        margins = [weights[self.rows[i][0]] @ self.rows[i][1] for i in held_out]
        return float(np.mean(np.sign(margins) + 1) / 2)  # neither counts as half


def _features(text: str) -> set[int]:
    words = re.findall(r"\w+|[^\w\s]", text.lower()[: 20 * WORDS])[:WORDS]
    pairs = (f"{a} {b}" for a, b in zip(["^", *words], [*words, "$"], strict=True))
    return {zlib.crc32(part.encode()) % FEATURES for part in [*words, *pairs]}


def said(accuracy: float | None) -> str:
    """Say the bar in a sentence."""
    said = "A bag of words that never saw the prompt ranks {:.0%} of them right: so far it may be style."
    return "" if accuracy is None else said.format(accuracy)
