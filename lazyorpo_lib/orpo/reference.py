"""DPO's frozen reference: what the model gave before training, once for each pair.

ORPO has none. With adapters the untrained model is always at hand; with full tuning it is soon gone.
"""

import contextlib
from collections import Counter
from collections.abc import Sequence

from .batching import EncodedPair
from .loss import sums_of
from .scoring import score


class Reference:
    """Summed log-probabilities of pairs under a trainer's model before training: `sums` has, by the pair's
    index, those of chosen and rejected, (2,) float32."""

    def __init__(self, trainer):
        self.trainer, self.sums = trainer, {}

    def remember(self, pairs: Sequence[EncodedPair]) -> Counter:
        """Compute what is missing; count tokens and forward passes. With full tuning: before any step."""
        work, missing = Counter(), [pair for pair in pairs if pair.index not in self.sums]
        with getattr(self.trainer.model, "disable_adapter", contextlib.nullcontext)():
            for batch, logps in score(self.trainer, missing):
                of_answers = sums_of(logps, batch.segment, batch.lengths)[:2].T
                self.sums |= {pair.index: row for pair, row in zip(batch.pairs, of_answers, strict=True)}
                work.update(tokens=batch.input_ids.numel(), forward_passes=1)
        return work
