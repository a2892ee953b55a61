import pytest
import torch

from lazyorpo_lib import head
from lazyorpo_lib.head import token_logps

CASES = [dict(), dict(softcap=5.0), dict(scale=0.25), dict(bias=True), dict(bias=True, softcap=3.0, scale=0.5)]


def reference(hidden, weight, targets, bias=None, softcap=0.0, scale=1.0):
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_equal_full_logits(case, trained, monkeypatch):
    torch.manual_seed(0)
    m, h, v = 50, 12, 37
    monkeypatch.setattr(head, "BLOCK_BYTES", 16 * 4 * v)  # several blocks, the last one short
    case = dict(case)
    bias = torch.randn(v, requires_grad=trained) if case.pop("bias", False) else None
    hidden, weight = torch.randn(m, h, requires_grad=True), torch.randn(v, h, requires_grad=trained)
    targets, upstream = torch.randint(v, (m,)), torch.randn(m)
    leaves = [hidden] + ([weight] + ([bias] if bias is not None else [])) * trained
    results = []
    for function in (token_logps, reference):
        out = function(hidden, weight, targets, bias=bias, **case)
        results.append([out, *torch.autograd.grad(out @ upstream, leaves)])
    for ours, true in zip(*results, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_sixteen_bit_matmuls_with_float32_softmax_stay_close_to_float32(trained):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(40, 64), torch.randn(200, 64) / 8, torch.randint(200, (40,))
    true = reference(hidden, weight, targets)
    half = token_logps(hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_(trained), targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, true, rtol=0.03, atol=0.05)


def test_a_frozen_head_keeps_no_logits_for_the_backward():
    hidden = torch.randn(30, 8, requires_grad=True)
    out = token_logps(hidden, torch.randn(1000, 8), torch.randint(1000, (30,)))
    assert sum(t.numel() for t in out.grad_fn.saved_tensors) == hidden.numel()


def test_without_gradient_nothing_is_kept():
    with torch.no_grad():
        assert token_logps(torch.randn(3, 8), torch.randn(9, 8), torch.tensor([0, 1, 8])).grad_fn is None
