"""Log-probabilities the plain way: what every faster way must equal.

Two right-padded rows a pair, the model's own logits, log-softmax, gather. A wing may hand the trainer a
faster scorer with the same `layout`, `refused`, `prove`, `inputs` and `read`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..errors import UserError
from ..machine import attempt
from .batching import Batch, EncodedPair, collate, split_by_tokens

LESS = "lower max_tokens, or choose method=qlora, or a smaller base_model"  # where one pair is too much


class PlainScorer:
    """Scores the answers of a causal LM of transformers.

    Attributes:
        layout: of `batching.collate`; rung: in words. refused: better ones, which the model does not take,
            {name: why}. proven: what was tried on the model, in words.
    """

    layout, rung, proven = "padded", "padded", ""

    def __init__(self, model):
        self.refused: dict[str, str] = {}

    def prove(self) -> None:
        """Try its numbers on the model anew; these are what all others are tried against."""

    @contextlib.contextmanager
    def inputs(self, batch: Batch):
        """Give the model's keyword arguments for a batch; its backward too belongs inside the block."""
        yield dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    def read(self, out, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Give the log-probability of each scored token, (M,) float32, and a router's loss, or None."""
        return logps_of(out.logits, batch.hidden_index, batch.targets), None


def logps_of(logits: Tensor, index: Tensor, targets: Tensor) -> Tensor:
    """Give the log-probabilities (M,) float32 of targets at places of flattened rows."""
    logits = logits.flatten(0, 1).index_select(0, index).float()
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


def score(trainer, pairs: Sequence[EncodedPair]) -> Iterator[tuple[Batch, Tensor]]:
    """Give micro-batches of `pairs` with the log-probabilities that a trainer's model gives, without
    gradient, in evaluation mode; smaller ones follow where memory runs out."""
    model, scorer, layout = trainer.wrapped, trainer.scorer, trainer.scorer.layout
    training = model.training

    @torch.no_grad()
    def logps(micro: list[EncodedPair]) -> tuple[Batch, Tensor]:
        batch = collate(micro, nll_over=trainer.settings.nll_over, layout=layout).to(trainer.device)
        with trainer.accelerator.autocast(), scorer.inputs(batch) as inputs:
            return batch, scorer.read(model(**inputs), batch)[0]

    model.eval()
    waiting = split_by_tokens(list(pairs), trainer.tokens_per_batch, layout)[::-1]
    try:
        while waiting:
            micro = waiting.pop()
            scored, message = attempt(partial(logps, micro))
            if not message:
                yield scored
                continue
            if len(micro) == 1:
                raise UserError(f"Out of memory in evaluating a single pair ({message}); {LESS}.")
            budget = max(1, sum(p.tokens(layout) for p in micro) // 2)
            waiting = split_by_tokens([p for some in (*waiting, micro) for p in some], budget, layout)[::-1]
            trainer.note(f"evaluation: out of memory; it goes on with {budget} tokens at once")
    finally:
        model.train(training)
