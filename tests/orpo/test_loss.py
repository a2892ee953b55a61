import math

import pytest
import torch

from lazyorpo_lib.orpo.loss import (
    by_name,
    dpo_loss,
    gradient_norms,
    log_odds,
    metrics,
    objective,
    odds_ratio_loss,
    pair_table,
)

EDGES = [
    0.0,
    -1e-12,
    -1e-8,
    -1e-7,
    -1e-6,
    -1e-5,
    -1e-3,
    -0.5,
    -math.log(2),
    -1.0,
    -17.0,
    -120.0,
    -1e4,
    -1e30,
    -math.inf,
]


def test_log_odds_is_zero_for_a_probability_of_one_half():
    assert log_odds(torch.tensor(-math.log(2))).item() == pytest.approx(0, abs=1e-6)


def test_or_loss_matches_a_pair_worked_by_hand():
    # P chosen = 0.8, odds 4; P rejected = 0.5, odds 1; -log sigmoid(log 4) = log(1 + 1/4).
    out = odds_ratio_loss(torch.tensor([math.log(0.8)]), torch.tensor([math.log(0.5)]))
    assert out.log_odds_chosen.item() == pytest.approx(math.log(4), rel=1e-5)
    assert out.log_odds_rejected.item() == pytest.approx(0, abs=1e-6)
    assert out.or_loss.item() == pytest.approx(math.log(1.25), rel=1e-5)
    sums = {"nll": torch.tensor(0.3), "or_loss": out.or_loss.sum()}
    loss = objective(sums, nll_tokens=1, pairs=1, or_weight=0.5)
    assert loss.item() == pytest.approx(0.3 + 0.5 * math.log(1.25), rel=1e-5)


def test_or_loss_is_ln_2_and_its_gradient_cancels_for_equal_answers():
    logp = torch.tensor([-0.7], requires_grad=True)
    loss = odds_ratio_loss(logp, logp).or_loss.sum()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and logp.grad.item() == 0


def test_swapping_the_answers_flips_the_log_odds_ratio():
    a, b = torch.tensor([-0.3, -2.0]), torch.tensor([-1.0, -0.1])
    torch.testing.assert_close(odds_ratio_loss(a, b).log_odds_ratio, -odds_ratio_loss(b, a).log_odds_ratio)


@pytest.mark.parametrize("chosen", EDGES)
@pytest.mark.parametrize("rejected", EDGES)
def test_value_and_gradient_are_finite_for_every_input_at_or_below_zero(chosen, rejected):
    c, r = (torch.tensor([x], requires_grad=True) for x in (chosen, rejected))
    out = odds_ratio_loss(c, r)
    out.or_loss.sum().backward()
    for x in (out.or_loss, out.log_odds_ratio, c.grad, r.grad):
        assert torch.isfinite(x).all()


def test_value_and_gradient_match_float64_where_the_clamp_is_not_at_work():
    x = -torch.logspace(-5, 2, 200)
    y = x.flip(0)
    ours = [t.clone().requires_grad_() for t in (x, y)]
    odds_ratio_loss(*ours).or_loss.sum().backward()
    exact = [t.double().requires_grad_() for t in (x, y)]
    odds = [t - torch.log1p(-torch.exp(t)) for t in exact]
    reference = torch.nn.functional.softplus(odds[1] - odds[0])
    reference.sum().backward()
    torch.testing.assert_close(odds_ratio_loss(x, y).or_loss.double(), reference, rtol=2e-5, atol=1e-6)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=2e-4, atol=1e-7)


def test_sixteen_bit_inputs_are_computed_in_float32():
    out = odds_ratio_loss(
        torch.tensor([-1e-3], dtype=torch.bfloat16), torch.tensor([-1.0], dtype=torch.bfloat16)
    )
    assert out.or_loss.dtype == torch.float32 and torch.isfinite(out.or_loss).all()


PAIRS = -torch.rand(64, generator=torch.Generator().manual_seed(0)).double().view(2, 32).float() * 3


def gradients(*beta):
    logps = [side.clone().requires_grad_() for side in PAIRS]
    out = odds_ratio_loss(*logps, *beta)
    out.or_loss.sum().backward()
    return [out.or_loss, *(x.grad for x in logps)]


def test_an_or_beta_of_1_is_the_papers_loss_bit_for_bit():
    chosen, rejected = (side.clone().requires_grad_() for side in PAIRS)
    loss = -torch.nn.functional.logsigmoid(log_odds(chosen) - log_odds(rejected))
    loss.sum().backward()
    for beta in ((), (1.0,)):
        for ours, papers in zip(gradients(*beta), (loss, chosen.grad, rejected.grad), strict=True):
            assert torch.equal(ours, papers)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0, 10.0])
def test_or_beta_scales_both_log_odds_inside_the_sigmoid(beta):
    """arXiv 2502.01237, Sec. 3.1.2: -log sigmoid(beta r_odds(chosen) - beta r_odds(rejected))."""
    chosen, rejected = (side.double().requires_grad_() for side in PAIRS)
    odds = [x - torch.log1p(-torch.exp(x)) for x in (chosen, rejected)]
    loss = torch.nn.functional.softplus(beta * odds[1] - beta * odds[0])
    loss.sum().backward()
    for ours, exact in zip(gradients(beta), (loss, chosen.grad, rejected.grad), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-4, atol=1e-6)
    plain, tempered = odds_ratio_loss(*PAIRS), odds_ratio_loss(*PAIRS, beta)
    assert torch.equal(plain.log_odds_ratio, tempered.log_odds_ratio), "what is measured stays the same"


@pytest.mark.parametrize("beta", [1.0, 0.3, 4.0])
def test_the_two_gradient_norms_are_those_of_the_loss_that_is_trained(beta):
    logps, lengths = -torch.rand(9) - 0.1, torch.tensor([2.0, 1.0, 3.0, 1.0, 2.0, 0.0])
    segment, step = torch.repeat_interleave(torch.arange(6), lengths.long()), dict(nll_tokens=5.0, pairs=2)
    norms = []
    for weight, name in ((0.0, "orpo"), (0.3, "odds alone")):
        leaf = logps.clone().requires_grad_()
        table = pair_table(leaf, segment, lengths, None, 0.1, beta)
        sums = by_name(table) if name == "orpo" else by_name(table) | {"nll": 0.0}
        objective(sums, **step, or_weight=weight).backward()
        norms.append(leaf.grad.square().sum())
    found = gradient_norms(table.detach(), lengths, **step, or_weight=0.3, or_beta=beta)
    torch.testing.assert_close(found, torch.stack(norms))


def test_zero_or_weight_and_sft_are_plain_nll():
    sums = {"nll": 3.0, "or_loss": 9.0, "dpo": 7.0}
    assert objective(sums, nll_tokens=2, pairs=1, or_weight=0.0) == 1.5
    assert objective(sums, nll_tokens=2, pairs=1, or_weight=0.5, name="sft") == 1.5
    assert objective(sums, nll_tokens=2, pairs=2, or_weight=0.5, name="dpo") == 3.5


@pytest.mark.parametrize("name", ["orpo", "sft", "dpo"])
def test_the_shares_of_micro_batches_add_up_to_the_loss_of_the_step_and_to_the_logged_one(name):
    logps, lengths = -torch.rand(9), torch.tensor([2.0, 1.0, 3.0, 1.0, 2.0, 0.0])
    segment = torch.repeat_interleave(torch.arange(6), lengths.long())
    table = pair_table(logps, segment, lengths, torch.tensor([[-1.0, -2.0], [-0.5, -0.7]]))
    step = dict(nll_tokens=table[:, 1].sum(), pairs=2, or_weight=0.3, name=name)
    whole = objective(by_name(table), **step)
    shares = [objective(by_name(table[i : i + 1]), **step) for i in range(2)]
    torch.testing.assert_close(sum(shares), whole)
    assert metrics(table.sum(0).tolist(), 0.3, name)["loss"] == pytest.approx(whole.item(), rel=1e-6)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="shape"):
        odds_ratio_loss(torch.zeros(2), torch.zeros(3))


def test_matches_trl_where_it_is_installed():
    trl = pytest.importorskip("trl.experimental.orpo")
    c, r = torch.tensor([-0.2, -1.5, -4.0]), torch.tensor([-0.9, -0.4, -6.0])
    fake = type("Fake", (), {"beta": 0.25, "accelerator": type("A", (), {"device": "cpu"})})()
    losses, _, _, ratio, chosen = trl.ORPOTrainer.odds_ratio_loss(fake, c, r)
    ours = odds_ratio_loss(c, r)
    torch.testing.assert_close(-0.25 * ours.or_loss, losses)
    assert ours.log_odds_ratio.mean().item() == pytest.approx(chosen.item(), rel=1e-5)
    assert -ours.or_loss.mean().item() == pytest.approx(ratio.item(), rel=1e-5)


def test_dpo_loss_is_ln_2_at_the_reference_and_falls_as_the_margin_grows():
    ref = torch.tensor([-10.0]), torch.tensor([-12.0])
    assert dpo_loss(*ref, *ref, 0.1).item() == pytest.approx(math.log(2))
    assert dpo_loss(ref[0] + 5, ref[1] - 5, *ref, 0.1).item() == pytest.approx(
        math.log1p(math.exp(-1.0)), rel=1e-5
    )
