import itertools

import pytest
import torch

from lazyorpo_lib.batching import LAYOUTS, EncodedPair, StepSampler, collate, split_by_tokens

PAIR = EncodedPair(7, [1, 2], [3, 9], [4, 5, 9])


def test_shared_row_holds_the_prompt_once_and_restarts_positions_for_rejected():
    batch = collate([PAIR])
    assert batch.input_ids.tolist() == [[1, 2, 3, 9, 4, 5, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert batch.targets.tolist() == [3, 9, 4, 5, 9]
    assert batch.hidden_index.tolist() == [1, 2, 1, 4, 5]
    assert batch.segment.tolist() == [0, 0, 1, 1, 1]
    assert batch.attention_mask is None


@pytest.mark.parametrize("nll_over", ["answer", "prompt+answer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scored_tokens_are_both_answers_with_their_ends_and_the_prompt_when_asked(layout, nll_over, pairs):
    batch = collate(pairs, layout=layout, nll_over=nll_over)
    b = len(pairs)
    for i, pair in enumerate(pairs):
        for segment, tokens in ((i, pair.chosen), (b + i, pair.rejected), (2 * b + i, pair.prompt[1:])):
            scored = batch.targets[batch.segment == segment].tolist()
            assert scored == (list(tokens) if segment < 2 * b or nll_over == "prompt+answer" else [])
            assert batch.lengths[segment] == len(scored)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_scored_token_is_predicted_from_the_token_before_it_in_its_own_text(layout, pairs):
    batch = collate(pairs, layout=layout)
    tokens, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    for i, pair in enumerate(pairs):
        for segment, answer in ((i, pair.chosen), (len(pairs) + i, pair.rejected)):
            sources = batch.hidden_index[batch.segment == segment]
            assert tokens[sources].tolist() == [pair.prompt[-1], *answer[:-1]]
            assert positions[sources].tolist() == list(range(len(pair.prompt) - 1, len(pair.prompt) + len(answer) - 1))


@pytest.mark.parametrize("layout", LAYOUTS)
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


@pytest.mark.parametrize("count,step,world", [(24, 4, 1), (25, 4, 1), (26, 8, 2), (25, 8, 2), (7, 7, 4), (9, 8, 2)])
def test_every_pair_comes_once_an_epoch_over_all_ranks(count, step, world):
    lengths = [10 + i % 7 for i in range(count)]
    ranks = [list(StepSampler(lengths, step, seed=3, rank=r, world=world)) for r in range(world)]
    assert len({len(r) for r in ranks}) == 1 == len({len(ranks[0]), len(StepSampler(lengths, step, seed=3, world=world))})
    assert sorted(i for rank in ranks for s in rank for i in s) == list(range(count))
    assert all(s for rank in ranks for s in rank)


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = StepSampler([5] * 40, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(itertools.chain(*sampler))

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_the_tokens_of_a_step_are_balanced_over_ranks():
    lengths = [100, 10, 10, 10, 10, 10, 10, 30] * 4
    loads = []
    for rank in range(2):
        sampler = StepSampler(lengths, 16, seed=0, rank=rank, world=2)
        loads.append([sum(lengths[i] for i in step) for step in sampler])
    assert all(abs(a - b) <= 100 for a, b in zip(*loads, strict=True))


def test_fewer_pairs_than_ranks_is_refused():
    with pytest.raises(ValueError, match="processes"):
        StepSampler([5, 5], 8, seed=0, world=4)


def test_batch_moves_all_its_tensors():
    batch = collate([PAIR]).to("meta")
    assert all(x.device.type == "meta" for x in vars(batch).values() if isinstance(x, torch.Tensor))
