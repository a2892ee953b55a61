"""Pairs -> steps and micro-batches.

The usual layout is `shared`: one row without padding; each pair's prompt and chosen, then each pair's
rejected, whose positions start again where its prompt ended. Models that cannot take it get `packed` (two
documents a pair) or `padded` (two right-padded rows a pair). It tokenizes nothing and computes nothing.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError


class EncodedPair(NamedTuple):
    """Token ids of one pair. Both answers end with the token that ends an answer."""

    index: int  # row of the dataset, for messages
    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]

    def tokens(self, layout: str = "shared") -> int:
        """Count the tokens that this pair costs in a layout, padding included."""
        p, c, r = len(self.prompt), len(self.chosen), len(self.rejected)
        return {"shared": p + c + r, "packed": 2 * p + c + r, "padded": 2 * (p + max(c, r))}[layout]


class Span(NamedTuple):
    """Where a pair lies in a `shared` row: where prompt and rejected start; the lengths, in tokens."""

    start: int
    rejected_start: int
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
    segment: Tensor  # (M,) int64: i chosen of pair i; B + i rejected; 2 B + i prompt (for the nll alone)
    lengths: Tensor  # (3 B,) float32, scored tokens in each segment
    pairs: list[EncodedPair]
    # Of a `shared` row alone: its pairs, and what every rejected answer sees: each [prompt, rejected].
    spans: list[Span] = field(default_factory=list)
    keys: Tensor | None = None  # (K,) int64, into N
    # (3, B + 1) int32: where each [prompt, chosen] begins, each rejected, its piece of `keys`; and the ends.
    starts: Tensor | None = None

    def to(self, device) -> "Batch":
        """Move every tensor in one copy, from pinned memory to a CUDA device: nothing there is waited for."""
        moving = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        flat = torch.cat([t.flatten().long() for t in moving.values()])
        flat = flat.pin_memory() if torch.device(device).type == "cuda" else flat
        pieces = flat.to(device, non_blocking=True).split([t.numel() for t in moving.values()])
        for (name, t), moved in zip(moving.items(), pieces, strict=True):
            setattr(self, name, moved.view(t.shape).to(t.dtype))
        return self


def collate(pairs: list[EncodedPair], *, nll_over: str = "answer", layout: str = "shared") -> Batch:
    """Lay out pairs as one micro-batch.

    Example, `shared`, prompts [1, 2] and [6], chosen [3, 9] and [7, 9], rejected [4, 5, 9] and [8, 9]:
        input_ids     1 2 3 9 6 7 9 4 5 9 8 9
        position_ids  0 1 2 3 0 1 2 2 3 4 1 2
        targets       3 9 4 5 9 7 9 8 9, predicted from the hidden states at 1 2 1 7 8 4 5 4 10

    Args:
        nll_over: "prompt+answer" also scores the prompt's tokens (all but its first, which nothing predicts).
        layout: shared, packed or padded.
    """
    b, shared = len(pairs), layout == "shared"
    p, c, r = np.array([[len(tokens) for tokens in pair[1:]] for pair in pairs]).T
    first, rejected, rows, width = _places(p, c, r, layout)
    before = first if shared else rejected - p  # the prompt that a rejected answer follows
    # The pieces of text; a shared prompt is written twice into the same place.
    lengths = np.stack([p, c, p, r])
    place = _ranges(np.stack([first, first + p, before, rejected]), lengths)
    input_ids, position_ids = np.zeros((2, rows * width), dtype=np.int64)
    input_ids[place] = np.concatenate([pair[kind] for kind in (1, 2, 1, 3) for pair in pairs])
    position_ids[place] = _ranges(np.stack([0 * p, p, 0 * p, p]), lengths)
    # What is scored, pair by pair: the prompt's tail, chosen, rejected; each predicted by the token before.
    counts = np.stack([(p - 1) * (nll_over == "prompt+answer"), c, r], axis=1)
    scored = _ranges(np.stack([first + 1, first + p, rejected], axis=1), counts)
    hidden_index = scored - 1
    hidden_index[counts.cumsum().reshape(b, 3)[:, 1]] = before + p - 1  # predicts rejected's first token
    segment = np.stack([np.arange(b) + k * b for k in (2, 0, 1)], axis=1)
    mask = np.arange(width) < np.stack([p + c, p + r], axis=1).reshape(-1, 1)
    return Batch(
        input_ids=torch.from_numpy(input_ids.reshape(rows, width)),
        position_ids=torch.from_numpy(position_ids.reshape(rows, width)),
        attention_mask=torch.from_numpy(mask).long() if layout == "padded" else None,
        hidden_index=torch.from_numpy(hidden_index),
        targets=torch.from_numpy(input_ids[scored]),
        segment=torch.from_numpy(segment.ravel().repeat(counts.ravel())),
        lengths=torch.from_numpy(counts[:, [1, 2, 0]].T.flatten()).float(),
        pairs=pairs,
        **(_seen_by_rejected(first, rejected, p, c, r) if shared else {}),
    )


def _seen_by_rejected(first, rejected, p, c, r) -> dict:
    """Make the fields of a Batch that a shared row has alone."""
    return dict(
        spans=[Span(*span) for span in np.stack([first, rejected, p, c, r], axis=1).tolist()],
        keys=torch.from_numpy(_ranges(np.stack([first, rejected], axis=1), np.stack([p, r], axis=1))),
        starts=torch.from_numpy(np.stack([_ends(n) for n in (p + c, r, p + r)])).int(),
    )


def _places(p, c, r, layout: str):
    """Tell where each pair's first prompt and its rejected answer begin in the flat rows, (B,) each; how many
    rows, how wide."""
    if layout == "shared":  # every [prompt, chosen], then every rejected: two slices of the row
        return _ends(p + c)[:-1], (p + c).sum() + _ends(r)[:-1], 1, (p + c + r).sum()
    if layout == "packed":
        ends = _ends(2 * p + c + r)
        return ends[:-1], ends[:-1] + 2 * p + c, 1, ends[-1]
    width = (p + np.maximum(c, r)).max()
    first = np.arange(len(p)) * 2 * width
    return first, first + width + p, 2 * len(p), width


def _ends(lengths) -> np.ndarray:
    """Give 0 and the ends of pieces that lie one after the other."""
    return np.concatenate([[0], lengths.cumsum()])


def _ranges(starts, lengths) -> np.ndarray:
    """List range(start, start + length) of each, one after the other."""
    starts, lengths = starts.ravel(), lengths.ravel()
    ends = _ends(lengths)
    return (starts - ends[:-1]).repeat(lengths) + np.arange(ends[-1])


def split_by_tokens(pairs: list[EncodedPair], tokens_per_batch: int, layout="shared") -> list[list]:
    """Deal the pairs of a step into as few micro-batches of at most `tokens_per_batch` tokens as first-fit
    finds, longest first. A pair longer than the budget is a micro-batch of its own."""
    batches, room = [], []
    for pair in sorted(pairs, key=lambda p: (-p.tokens(layout), p.index)):
        cost = pair.tokens(layout)
        k = next((k for k, free in enumerate(room) if free >= cost), len(room))
        if k == len(room):
            batches.append([])
            room.append(tokens_per_batch)
        batches[k].append(pair)
        room[k] -= cost
    return batches


class StepOrder:
    """Which pairs each optimizer step takes, on this rank: every pair once an epoch, in an order that depends
    on (seed, epoch) alone, the tokens of each step balanced over the ranks. Its length: an epoch's steps.

    Args:
        lengths: tokens of each pair. pairs_per_step: over all ranks.
    """

    def __init__(self, lengths: Sequence[int], pairs_per_step: int, *, seed: int, rank=0, world=1):
        fewest = min(pairs_per_step, len(lengths))
        if fewest < world:
            why = f"{fewest} pairs a step cannot be shared by {world} processes"
            raise UserError(f"{why}: raise pairs_per_step, or start fewer.")
        self.lengths, self.pairs_per_step, self.seed = lengths, pairs_per_step, seed
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.pairs_per_step)
        # A remainder too small to give every rank a pair joins the step before it.
        return max(1, full + (rest >= self.world))

    def steps(self, epoch: int, first: int = 0) -> Iterator[list[int]]:
        """Give the positions of this rank's pairs in each step of an epoch, from step `first` on."""
        order = list(range(len(self.lengths)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        for step in range(first, len(self)):
            end = None if step == len(self) - 1 else (step + 1) * self.pairs_per_step
            yield self._share(order[step * self.pairs_per_step : end])

    def _share(self, chunk: list[int]) -> list[int]:
        shares, loads = [[] for _ in range(self.world)], [0] * self.world
        for index in sorted(chunk, key=lambda i: (-self.lengths[i], i)):
            lightest = loads.index(min(loads))  # one that has no pair yet, as long as there is one
            shares[lightest].append(index)
            loads[lightest] += self.lengths[index]
        return shares[self.rank]
