"""Encoded pairs -> the rows a model is run on, and which of their tokens are scored.

The usual layout is `shared`: one row of tokens without padding; for each pair prompt, chosen, rejected, one
after the other, positions of rejected starting again where the prompt ended. Models that cannot take it get
`packed` (two documents a pair) or `padded` (two right-padded rows a pair). Nothing outside this module, attention.py
and head.py knows a layout. It tokenizes nothing and computes no attention.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .settings import UserError

LAYOUTS = ("shared", "packed", "padded")


class EncodedPair(NamedTuple):
    """Token ids of one pair. Both answers end with the token that ends an answer."""

    index: int  # row of the dataset, for messages
    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]

    def tokens(self, layout: str = "shared") -> int:
        """Tokens that this pair costs in a layout, padding included."""
        p, c, r = len(self.prompt), len(self.chosen), len(self.rejected)
        return {"shared": p + c + r, "packed": 2 * p + c + r, "padded": 2 * (p + max(c, r))}[layout]


class Span(NamedTuple):
    """Where a pair lies in a `shared` row: it starts at `start`; then the lengths, in tokens."""

    start: int
    prompt: int
    chosen: int
    rejected: int


@dataclass
class Batch:
    """One micro-batch of B pairs: R rows of N tokens, M of them scored."""

    input_ids: Tensor  # (R, N) int64
    position_ids: Tensor  # (R, N) int64
    attention_mask: Tensor | None  # (R, N) int64 where there is padding, else None
    hidden_index: Tensor  # (M,) int64, into R * N: the position whose hidden state predicts the scored token
    targets: Tensor  # (M,) int64, the scored tokens
    segment: Tensor  # (M,) int64: i chosen answer of pair i; B + i rejected; 2 B + i prompt (scored for the nll alone)
    lengths: Tensor  # (3 B,) float32, scored tokens in each segment
    pairs: list[EncodedPair]
    spans: list[Span]

    def to(self, device) -> "Batch":
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), Tensor):
                setattr(self, f.name, value.to(device, non_blocking=True))
        return self


def collate(pairs: list[EncodedPair], *, nll_over: str = "answer", layout: str = "shared") -> Batch:
    """Lay out pairs as one micro-batch.

    Example, `shared`, prompt [1, 2], chosen [3, 9], rejected [4, 5, 9]:
        input_ids     1 2 3 9 4 5 9
        position_ids  0 1 2 3 2 3 4
        targets       3 9 4 5 9, predicted from the hidden states at 1 2 1 4 5

    Args:
        nll_over: "prompt+answer" also scores the prompt's tokens (all but its first, which nothing predicts).
        layout: one of LAYOUTS.
    """
    rows, positions, scored, spans = [[]], [[]], [], []  # scored: (row, column of the hidden state, token, segment)
    for i, (_, prompt, chosen, rejected) in enumerate(pairs):
        prompt = list(prompt)
        p = len(prompt)
        for side, answer in enumerate((chosen, rejected)):
            if side == 0 or layout != "shared":
                if layout == "padded" and rows[-1]:
                    rows.append([]), positions.append([])
                start = len(rows[-1])
                rows[-1] += prompt
                positions[-1] += range(p)
            row, first = len(rows) - 1, len(rows[-1])
            if side == 0 and nll_over == "prompt+answer":
                scored += [(row, start + t, prompt[t + 1], 2 * len(pairs) + i) for t in range(p - 1)]
            # The first answer token is predicted by the prompt's last, the others by the one before them.
            sources = [start + p - 1, *range(first, first + len(answer) - 1)]
            scored += [(row, s, token, side * len(pairs) + i) for s, token in zip(sources, answer, strict=True)]
            rows[-1] += answer
            positions[-1] += range(p, p + len(answer))
        spans.append(Span(start, p, len(chosen), len(rejected)))
    width = max(map(len, rows))
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows] if layout == "padded" else None
    row, column, targets, segment = torch.tensor(scored).T.contiguous()
    return Batch(
        input_ids=torch.tensor([r + [0] * (width - len(r)) for r in rows]),
        position_ids=torch.tensor([p + [0] * (width - len(p)) for p in positions]),
        attention_mask=None if mask is None else torch.tensor(mask),
        hidden_index=row * width + column,
        targets=targets,
        segment=segment,
        lengths=torch.bincount(segment, minlength=3 * len(pairs)).float(),
        pairs=pairs,
        spans=spans if layout == "shared" else [],
    )


def split_by_tokens(pairs: list[EncodedPair], tokens_per_batch: int, layout: str = "shared") -> list[list[EncodedPair]]:
    """Deal the pairs of a step into as few micro-batches of at most `tokens_per_batch` tokens as first-fit
    finds, longest first. A pair longer than the budget is a micro-batch of its own."""
    batches: list[list[EncodedPair]] = []
    room: list[int] = []
    for pair in sorted(pairs, key=lambda p: (-p.tokens(layout), p.index)):
        cost = pair.tokens(layout)
        k = next((k for k, free in enumerate(room) if free >= cost), None)
        if k is None:
            batches.append([pair])
            room.append(tokens_per_batch - cost)
        else:
            batches[k].append(pair)
            room[k] -= cost
    return batches


class StepSampler(Sampler[list[int]]):
    """Which pairs each optimizer step takes, on this rank: every pair once an epoch, in an order that depends
    on (seed, epoch) alone, the tokens of each step balanced over the ranks.

    Args:
        lengths: tokens of each pair.
        pairs_per_step: pairs in a step over all ranks.

    Raises:
        UserError: a step or the dataset holds fewer pairs than there are ranks.
    """

    def __init__(self, lengths: Sequence[int], pairs_per_step: int, *, seed: int, rank: int = 0, world: int = 1):
        if min(pairs_per_step, len(lengths)) < world:
            fewest = min(pairs_per_step, len(lengths))
            raise UserError(f"{fewest} pairs a step cannot be shared by {world} processes: raise pairs_per_step, or start fewer.")
        self.lengths, self.pairs_per_step, self.seed, self.rank, self.world = lengths, pairs_per_step, seed, rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.pairs_per_step)
        # A remainder too small to give every rank a pair joins the step before it.
        return max(1, full + (rest >= self.world))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.lengths)))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        for step in range(len(self)):
            last = step == len(self) - 1
            chunk = order[step * self.pairs_per_step : None if last else (step + 1) * self.pairs_per_step]
            yield self._share(chunk)

    def _share(self, chunk: list[int]) -> list[int]:
        shares, loads = [[] for _ in range(self.world)], [0] * self.world
        for index in sorted(chunk, key=lambda i: (-self.lengths[i], i)):
            lightest = min(range(self.world), key=lambda k: (bool(shares[k]), loads[k]))
            shares[lightest].append(index)
            loads[lightest] += self.lengths[index]
        return shares[self.rank]
