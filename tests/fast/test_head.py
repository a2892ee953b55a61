import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lazyorpo_lib.fast import head
from lazyorpo_lib.fast.head import token_logps

CASES = [
    dict(),
    dict(softcap=5.0),
    dict(scale=0.25),
    dict(bias=True),
    dict(bias=True, softcap=3.0, scale=0.5),
]


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


def plain(hidden, weight, targets, bias=None, softcap=0.0, scale=1.0):
    """The formula as it is written, all in float32 after the product: log-probabilities and d logp / d
    hidden."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = (logits if bias is None else logits + bias) * scale
    t = torch.tanh(logits / softcap) if softcap else logits
    logps = torch.log_softmax(softcap * t if softcap else logits, -1)
    gradient = (
        (torch.nn.functional.one_hot(targets, len(weight)) - logps.exp())
        * scale
        * (1 - t * t if softcap else 1)
    )
    return logps.gather(1, targets[:, None])[:, 0], gradient.to(weight.dtype) @ weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_the_plain_formula_to_the_bit_and_their_gradient_no_less_exact(
    case, dtype, monkeypatch
):
    torch.manual_seed(0)
    m, h, v = 96, 48, 500
    monkeypatch.setattr(head, "BLOCK_BYTES", 32 * 4 * v)
    case = dict(case)
    bias = torch.randn(v) if case.pop("bias", False) else None
    hidden, weight = torch.randn(m, h).to(dtype).requires_grad_(), (torch.randn(v, h) / 4).to(dtype)
    targets = (hidden @ weight.T).argmax(1)  # likely tokens, as after some training: p is near 1
    with torch.no_grad():
        blocks = [
            plain(hidden[i : i + 32], weight, targets[i : i + 32], bias, **case) for i in range(0, m, 32)
        ]
        logps, jacobian = (torch.cat(x) for x in zip(*blocks, strict=True))
        _, true = plain(hidden.double(), weight.double(), targets, bias, **case)
    ours = token_logps(hidden, weight, targets, bias=bias, **case)
    assert torch.equal(ours, logps)
    (ours,) = torch.autograd.grad(ours.sum(), hidden)
    assert (ours - true).norm() <= 1.02 * (jacobian - true).norm() + 1e-6 * true.norm()


class Peak(TorchDispatchMode):
    """The most bytes that what is made inside takes at once."""

    def __init__(self, *given):
        super().__init__()
        self.live = self.most = 0
        self.seen = {t.untyped_storage()._cdata for t in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storage = out.untyped_storage() if isinstance(out, torch.Tensor) else None
        if storage is not None and storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
            self.most = max(self.most, self.live)
        return out

    def _free(self, key, size):
        self.seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("trained", [False, True])
def test_a_second_block_takes_no_more_memory_than_the_first(trained, monkeypatch):
    v, peaks = 4000, []
    monkeypatch.setattr(head, "BLOCK_BYTES", 128 * 4 * v)
    for m in (128, 512):
        hidden = torch.randn(m, 8, dtype=torch.bfloat16, requires_grad=True)
        weight, targets = (
            torch.randn(v, 8, dtype=torch.bfloat16, requires_grad=trained),
            torch.randint(v, (m,)),
        )
        with Peak(hidden, weight, targets) as peak:
            token_logps(hidden, weight, targets).sum().backward()
        peaks.append(peak.most / (128 * v))
    assert peaks[1] < peaks[0] + 0.5 and peaks[1] < 9  # bytes a logit of one block: float32 twice


def test_blocks_are_whole_tiles_of_a_matrix_product():
    for vocabulary, rows in ((128256, 256), (49152, 640), (262144, 128), (300000, 111), (10**7, 16)):
        blocks = list(head._blocks(torch.empty(vocabulary, 1, device="meta"), 1000))
        assert blocks[0] == slice(0, rows) and blocks[1].start == rows
