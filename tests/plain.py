"""The truth of a model's numbers: plain, unpadded forwards of each prompt + answer, and the paper's loss.

It uses nothing of the kit, so that both can only be right together.
"""

import contextlib
import inspect

import torch


def plain_logps(model, pairs) -> torch.Tensor:
    """Log-probabilities of the answers' tokens by a plain, unpadded forward of each prompt + answer."""
    out, takes = [], inspect.signature(model.forward).parameters
    for prompt, answer in ((pair.prompt, answer) for pair in pairs for answer in pair[2:]):
        ids = torch.tensor([[*prompt, *answer]])
        given = dict(attention_mask=torch.ones_like(ids), use_cache=False)
        logits = model(input_ids=ids, **{n: v for n, v in given.items() if n in takes}).logits[0]
        if logits.shape[0] != ids.shape[1]:
            raise ValueError(f"{logits.shape[0]} logits for {ids.shape[1]} tokens")
        logits = logits[len(prompt) - 1 : -1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        out.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])[:, 0])
    return torch.cat(out)


def now(model, pairs) -> torch.Tensor:
    with torch.no_grad():
        return plain_logps(model.eval(), pairs)


def plain_loss(model, pairs, or_weight: float) -> torch.Tensor:
    """The ORPO loss of the paper: token mean of the chosen answers' nll, pair mean of the odds term."""
    lengths = [len(answer) for pair in pairs for answer in pair[2:]]
    found = plain_logps(model, pairs).split(lengths)
    loss = -torch.cat(found[::2]).mean()
    for chosen, rejected in zip(found[::2], found[1::2], strict=True):
        c, r = chosen.mean(), rejected.mean()
        ratio = (c - torch.log1p(-torch.exp(c))) - (r - torch.log1p(-torch.exp(r)))
        loss = loss - or_weight / len(pairs) * torch.nn.functional.logsigmoid(ratio)
    return loss


def plain_gradients(model, pairs, or_weight: float) -> dict:
    """The gradient of the loss, in training mode, or where no plain batch passes in that, in evaluation."""
    for training in (True, False):
        with contextlib.suppress(*[Exception] * training):
            model.train(training).zero_grad()
            plain_loss(model, pairs, or_weight).backward()
            return gradients(model)


def gradients(model) -> dict:
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def apart(ours, true) -> float:
    """|ours - true| / |true|, of tensors, or of dicts of tensors over all of them together."""
    if not isinstance(ours, dict):
        ours, true = {"": ours}, {"": true}
    off = total = 0.0
    for name in ours.keys() | true.keys():
        a, b = ours.get(name), true.get(name)
        off += ((0 if a is None else a.double()) - (0 if b is None else b.double())).square().sum().item()
        total += 0 if b is None else b.double().square().sum().item()
    return off**0.5 / max(total**0.5, 1e-30)
