import itertools
import re
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lazyorpo_lib.orpo.batching import EncodedPair, StepOrder, collate, split_by_tokens

PAIR = EncodedPair(7, [1, 2], [3, 9], [4, 5, 9])


def test_shared_row_holds_the_prompt_once_and_restarts_positions_for_rejected():
    batch = collate([PAIR])
    assert batch.input_ids.tolist() == [[1, 2, 3, 9, 4, 5, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert batch.targets.tolist() == [3, 9, 4, 5, 9]
    assert batch.hidden_index.tolist() == [1, 2, 1, 4, 5]
    assert batch.segment.tolist() == [0, 0, 1, 1, 1]
    assert batch.attention_mask is None


def test_a_row_of_two_pairs_is_what_the_docstring_shows():
    batch = collate([PAIR, EncodedPair(8, [6], [7, 9], [8, 9])])
    for name in ("input_ids", "position_ids"):
        shown = re.search(rf"{name} +([\d ]+)", collate.__doc__)[1].split()
        assert getattr(batch, name).tolist() == [[int(n) for n in shown]]
    targets, sources = re.search(
        r"targets +([\d ]+), predicted from the hidden states at ([\d ]+)", collate.__doc__
    ).groups()
    assert batch.targets.tolist() == [int(n) for n in targets.split()]
    assert batch.hidden_index.tolist() == [int(n) for n in sources.split()]


@pytest.mark.parametrize("nll_over", ["answer", "prompt+answer"])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_scored_tokens_are_both_answers_with_their_ends_and_the_prompt_when_asked(layout, nll_over, pairs):
    batch = collate(pairs, layout=layout, nll_over=nll_over)
    b = len(pairs)
    for i, pair in enumerate(pairs):
        for segment, tokens in ((i, pair.chosen), (b + i, pair.rejected), (2 * b + i, pair.prompt[1:])):
            scored = batch.targets[batch.segment == segment].tolist()
            assert scored == (list(tokens) if segment < 2 * b or nll_over == "prompt+answer" else [])
            assert batch.lengths[segment] == len(scored)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_every_scored_token_is_predicted_from_the_token_before_it_in_its_own_text(layout, pairs):
    batch = collate(pairs, layout=layout)
    tokens, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    for i, pair in enumerate(pairs):
        for segment, answer in ((i, pair.chosen), (len(pairs) + i, pair.rejected)):
            sources = batch.hidden_index[batch.segment == segment]
            assert tokens[sources].tolist() == [pair.prompt[-1], *answer[:-1]]
            assert positions[sources].tolist() == list(
                range(len(pair.prompt) - 1, len(pair.prompt) + len(answer) - 1)
            )


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_tokens_of_a_pair_are_what_its_layout_really_runs(layout):
    assert PAIR.tokens(layout) == collate([PAIR], layout=layout).input_ids.numel()


def test_shared_rows_have_no_padding_and_no_prompt_token_twice(pairs):
    assert collate(pairs).input_ids.numel() == sum(len(t) for p in pairs for t in p[1:])


def test_splitting_keeps_every_pair_once_within_the_budget(pairs):
    batches = split_by_tokens(pairs, 90)
    assert sorted(p.index for b in batches for p in b) == [p.index for p in pairs]
    assert all(sum(p.tokens() for p in b) <= 90 for b in batches)
    assert len(batches) < len(pairs)


def test_a_pair_longer_than_the_budget_is_a_batch_of_its_own(pairs):
    assert split_by_tokens(pairs, 1) == [[p] for p in sorted(pairs, key=lambda p: (-p.tokens(), p.index))]


@pytest.mark.parametrize(
    "count,step,world", [(24, 4, 1), (25, 4, 1), (26, 8, 2), (25, 8, 2), (7, 7, 4), (9, 8, 2)]
)
def test_every_pair_comes_once_an_epoch_over_all_ranks(count, step, world):
    lengths = [10 + i % 7 for i in range(count)]
    ranks = [list(StepOrder(lengths, step, seed=3, rank=r, world=world).steps(0)) for r in range(world)]
    assert (
        len({len(r) for r in ranks})
        == 1
        == len({len(ranks[0]), len(StepOrder(lengths, step, seed=3, world=world))})
    )
    assert sorted(i for rank in ranks for s in rank for i in s) == list(range(count))
    assert all(s for rank in ranks for s in rank)


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return list(itertools.chain(*StepOrder([5] * 40, 4, seed=seed).steps(epoch)))

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_the_tokens_of_a_step_are_balanced_over_ranks():
    lengths = [100, 10, 10, 10, 10, 10, 10, 30] * 4
    loads = []
    for rank in range(2):
        order = StepOrder(lengths, 16, seed=0, rank=rank, world=2)
        loads.append([sum(lengths[i] for i in step) for step in order.steps(0)])
    assert all(abs(a - b) <= 100 for a, b in zip(*loads, strict=True))


def test_fewer_pairs_than_ranks_is_refused():
    with pytest.raises(ValueError, match="processes"):
        StepOrder([5, 5], 8, seed=0, world=4)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_batch_moves_all_its_tensors_in_one_copy_and_changes_none(layout, pairs):
    here, moved = collate(pairs, layout=layout), collate(pairs, layout=layout)
    with Copies() as copies:
        moved.to("meta")
    assert copies.count == 1
    moved = collate(pairs, layout=layout).to("cpu")
    for name, x in vars(here).items():
        if isinstance(x, torch.Tensor):
            y = getattr(moved, name)
            assert x.dtype == y.dtype and x.device == y.device and torch.equal(x, y), name
    batch = collate(pairs, layout=layout).to("meta")
    assert all(x.device.type == "meta" for x in vars(batch).values() if isinstance(x, torch.Tensor))


class Copies(TorchDispatchMode):
    """Counts the copies from the host to another device."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._to_copy.default:
            self.count += args[0].device.type == "cpu" != out.device.type
        return out


def test_every_chosen_lies_before_every_rejected_and_what_a_rejected_sees_is_gathered(pairs):
    batch = collate(pairs)
    row, ends = batch.input_ids[0], batch.starts.tolist()
    assert row.tolist() == [t for p in pairs for t in (*p.prompt, *p.chosen)] + [
        t for p in pairs for t in p.rejected
    ]
    assert row[batch.keys].tolist() == [t for p in pairs for t in (*p.prompt, *p.rejected)]
    sizes = [
        [len(p.prompt) + len(p.chosen) for p in pairs],
        [len(p.rejected) for p in pairs],
        [len(p.prompt) + len(p.rejected) for p in pairs],
    ]
    assert (
        ends == [list(itertools.accumulate(n, initial=0)) for n in sizes]
        and batch.starts.dtype == torch.int32
    )
    for pair, span in zip(pairs, batch.spans, strict=True):
        assert row[span.start :][: span.prompt + span.chosen].tolist() == [*pair.prompt, *pair.chosen]
        assert row[span.rejected_start :][: span.rejected].tolist() == list(pair.rejected)
        assert (span.prompt, span.chosen, span.rejected) == tuple(map(len, pair[1:]))


def test_tokens_may_come_as_arrays(pairs):
    as_arrays = [EncodedPair(p.index, *(np.array(t, dtype=np.int32) for t in p[1:])) for p in pairs]
    for ours, plain in zip(vars(collate(as_arrays)).values(), vars(collate(pairs)).values(), strict=True):
        assert not isinstance(plain, torch.Tensor) or (ours.dtype == plain.dtype and torch.equal(ours, plain))


def test_a_batch_is_laid_out_without_a_python_loop_over_its_tokens():
    def calls(tokens):
        pairs, count = [EncodedPair(i, *([list(range(5, 5 + tokens))] * 3)) for i in range(4)], 0

        def count_lines(frame, event, arg):
            nonlocal count
            count += 1
            return count_lines

        sys.settrace(count_lines)
        try:
            collate(pairs)
        finally:
            sys.settrace(None)
        return count

    assert calls(1000) == calls(10)
