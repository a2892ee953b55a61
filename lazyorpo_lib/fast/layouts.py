"""Which layout a model takes, proven on the model itself, and the scorer that runs it in this layout.

It owns no kernel (attention.py), no output layer (head.py) and no rows (orpo/batching.py).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import UserError
from ..orpo.batching import Batch, EncodedPair, collate
from .attention import NAME, RowAttention, brief
from .head import ScoringForward

# (name, layout of batching.py, attention or None for the model's own), best first; the last is always right.
LADDER = (
    ("shared", "shared", NAME),
    ("shared, dense masks", "shared", "eager"),
    ("packed", "packed", None),
    ("padded", "padded", None),
)


class PairScorer:
    """Runs batches through a causal LM in the best layout that it provably takes.

    Each rung of LADDER is tried on the model with random tokens, without gradient: log-probabilities must
    equal those of separate, unpadded forwards (equality), and must not move when another answer's tokens
    change (leak). Both are needed: ALiBi by index passes the second and fails the first.

    Args:
        model: a transformers causal LM, unwrapped; its forward becomes a `head.ScoringForward`.
        attention: what computes shared rows.

    Attributes:
        rung: name of the chosen rung; layout: its layout for `batching.collate`; refused: {rung: why not}.
    """

    def __init__(self, model, attention: RowAttention | None = None):
        self.model, self.forward = model, ScoringForward(model)
        self.attention = attention or RowAttention()
        self.own_attention = model.config._attn_implementation
        self.refused: dict[str, str] = {}
        training = model.training
        model.eval()
        with torch.no_grad():
            probe = _Probe(self)
            for self.rung, self.layout, implementation in LADDER:
                model.set_attn_implementation(implementation or self.own_attention)
                why = probe.refusal() if self.rung != "padded" else ""
                if not why:
                    break
                self.refused[self.rung] = why
        model.train(training)

    @contextlib.contextmanager
    def inputs(self, batch: Batch) -> Iterator[dict]:
        """Give the keyword arguments with which the (possibly wrapped) model computes `batch`. Forward and
        backward belong inside the block: after it ordinary attention holds again."""
        given = dict(input_ids=batch.input_ids, hidden_index=batch.hidden_index, targets=batch.targets)
        if self.layout == "padded":
            given["attention_mask"] = batch.attention_mask
        else:
            given["position_ids"] = batch.position_ids
        if self.rung == "shared":
            # Not read; without it transformers would look for documents in the positions, and wait for it.
            given["attention_mask"] = torch.ones_like(batch.input_ids)
        elif self.layout == "shared":
            config = self.model.config.get_text_config()
            given["attention_mask"] = dense_masks(batch, config, self.model.dtype)
        with self.attention.over(batch) if self.rung == "shared" else contextlib.nullcontext():
            yield given

    def read(self, out: dict, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Read log-probabilities (M,) float32 and the router loss, or None, from what the model returned."""
        return out["logps"], out["router_loss"]

    def logps(self, batch: Batch) -> Tensor:
        """Compute the log-probability of each scored token, (M,) float32, by the bare model."""
        with self.inputs(batch) as inputs:
            return self.read(self.model(**inputs), batch)[0]


def dense_masks(batch: Batch, config, dtype) -> Tensor | dict[str, Tensor]:
    """Make the additive (1, 1, N, N) mask of a shared row, or one for each of the config's layer types: for
    attention that must run in transformers' own eager code (soft-capping, sinks, chunks)."""
    position, device = batch.position_ids[0], batch.position_ids.device
    pair, side = torch.zeros(2, len(position), dtype=torch.int32)
    for i, (start, rejected_start, p, c, r) in enumerate(batch.spans):
        pair[start : start + p + c] = pair[rejected_start : rejected_start + r] = i
        side[start + p : start + p + c], side[rejected_start : rejected_start + r] = 1, 2
    pair, side, index = pair.to(device), side.to(device), torch.arange(len(position), device=device)
    allowed = (pair[:, None] == pair) & (index[:, None] >= index) & ~((side[:, None] == 2) & (side == 1))
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    seen = {"full_attention": allowed}
    if window:
        seen["sliding_attention"] = allowed & (position[:, None] - position < window)
    if chunk:
        seen["chunked_attention"] = allowed & (position[:, None] // chunk == position // chunk)
    for kind, mask in seen.items():
        additive = torch.zeros(mask.shape, dtype=dtype, device=device)
        seen[kind] = additive.masked_fill_(~mask, torch.finfo(dtype).min)[None, None]
    if getattr(config, "layer_types", None):
        return {kind: seen[kind] for kind in set(config.layer_types)}
    return seen.get("sliding_attention", seen["full_attention"])


class _Probe:
    """Two random pairs, longer than the model's window where that is cheap, and their right scores."""

    def __init__(self, scorer: PairScorer):
        self.scorer, model = scorer, scorer.model
        self.device = model.get_input_embeddings().weight.device
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or 0
        self.words = min(config.vocab_size, 1000)
        for prompt in [window + 5] * (window + 5 <= (4608 if self.device.type == "cuda" else 256)) + [17]:
            with contextlib.suppress(torch.OutOfMemoryError):
                return self._draw(prompt)
        raise UserError(
            f"The weights leave no memory on {self.device} for a forward of 26 tokens: "
            "choose a smaller base_model, or method=qlora."
        )

    def _draw(self, prompt: int) -> None:
        generator = torch.Generator().manual_seed(0)  # its own: no run's random numbers may depend on it

        def tokens(n):
            return torch.randint(5, self.words, (n,), generator=generator).tolist()

        first = EncodedPair(0, tokens(prompt), tokens(9), tokens(7))
        self.pairs = [first, EncodedPair(1, tokens(5), tokens(3), tokens(6))]
        self.other = [first._replace(chosen=tokens(9)), self.pairs[1]]
        self.truth = self._separate()
        half = torch.is_autocast_enabled(self.device.type)
        dtype = torch.get_autocast_dtype(self.device.type) if half else self.scorer.model.dtype
        if not self.truth.isfinite().all():
            mend = "load its weights anew"
            if dtype != torch.float32:
                other = ", take a GPU that has bfloat16," if dtype == torch.float16 else ""
                mend = f"set precision=float32{other}"
            raise UserError(
                f"{str(dtype)[6:]} overflows in this model, or its weights are damaged: "
                f"its log-probabilities are not finite; {mend} or choose another base_model."
            )
        # In 16 bit even the truth depends on how rows are batched; that noise is measured, and allowed for.
        self.tolerance = 1e-4
        if dtype != torch.float32:
            self.tolerance = 1e-2 + 4 * (self._separate(pad=3) - self.truth).abs().max().item()

    def _separate(self, pad: int = 0) -> Tensor:
        """Score each answer in a forward of its own, `pad` tokens of padding behind it."""
        found = []
        for prompt, answer in ((pair.prompt, answer) for pair in self.pairs for answer in pair[2:]):
            end = len(prompt) + len(answer)
            ids = torch.tensor([[*prompt, *answer, *[0] * pad]], device=self.device)
            mask = (torch.arange(end + pad, device=self.device) < end).long()[None]
            last = len(answer) + 1 + pad  # not the logits of a prompt as long as a window
            options = dict(attention_mask=mask, use_cache=False, logits_to_keep=last)
            logits = self.scorer.forward.original(input_ids=ids, **options).logits[0, -last:][: len(answer)]
            targets = ids[0, len(prompt) : end, None]
            found.append(torch.log_softmax(logits.float(), dim=-1).gather(1, targets)[:, 0])
        return torch.cat(found)

    def refusal(self) -> str:
        """Say why the scorer's present rung is wrong for the model; nothing if it is right."""
        try:
            why = self._mismatch()
            if why and self.scorer.forward.plain:
                self.scorer.forward.plain = False  # perhaps it is only the head that is not what it seems
                why, first = self._mismatch(), why
                self.scorer.forward.plain = bool(why)
                why = why and first
            return why
        except Exception as error:  # whatever a model raises at an unusual row, it means: not this one
            return brief(error)

    def _mismatch(self) -> str:
        batch, moved = (
            self.scorer.logps(collate(pairs, layout=self.scorer.layout).to(self.device))
            for pairs in (self.pairs, self.other)
        )
        if not (error := (batch - self.truth).abs().max().item()) <= self.tolerance:  # NaN is no agreement
            return f"differs from separate forwards by {error:.2g} nats"
        rest = slice(len(self.pairs[0].chosen), None)
        if not (leak := (moved - batch)[rest].abs().max().item()) <= self.tolerance:
            return f"one answer leaks into another ({leak:.2g} nats)"
        return ""
