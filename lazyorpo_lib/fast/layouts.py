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

# (name, layout of batching.py, attention implementation or None for the model's own), best first; the last is right.
LADDER = (
    ("shared", "shared", NAME),
    ("shared, dense masks", "shared", "eager"),
    ("packed", "packed", None),
    ("padded", "padded", None),
)


class PairScorer:
    """Runs batches through a causal LM in the best layout that it provably takes.

    On construction each rung of LADDER is tried on the real model with random tokens, without gradient: the log-
    probabilities must equal those of separate, unpadded forwards (equality), and must not move when another answer's
    tokens change (leak). Both are needed: ALiBi by index passes the second and fails the first.

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
        """Give the keyword arguments with which the (possibly wrapped) model computes `batch`. Forward and backward
        belong inside the block: after it ordinary attention holds again."""
        given = dict(input_ids=batch.input_ids, hidden_index=batch.hidden_index, targets=batch.targets)
        if self.layout == "padded":
            given["attention_mask"] = batch.attention_mask
        else:
            given["position_ids"] = batch.position_ids
        if self.rung == "shared, dense masks":
            config = self.model.config.get_text_config()
            given["attention_mask"] = dense_masks(batch, config, self.model.dtype)
        if self.rung != "shared":
            yield given
            return
        # Not read; without it transformers would look through the positions for documents, and wait for the device.
        given["attention_mask"] = torch.ones_like(batch.input_ids)
        with self.attention.over(batch):
            yield given

    def read(self, out: dict, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Read log-probabilities (M,) float32 and the router loss, or None, from what the model returned."""
        return out["logps"], out["router_loss"]

    def logps(self, batch: Batch) -> Tensor:
        """Compute the log-probability of each scored token, (M,) float32, without wrappers around the model."""
        with self.inputs(batch) as inputs:
            return self.read(self.model(**inputs), batch)[0]


def dense_masks(batch: Batch, config, dtype) -> Tensor | dict[str, Tensor]:
    """Make the additive (1, 1, N, N) mask of a shared row, or one for each of the config's layer types: for models
    whose attention must run in transformers' own eager code (soft-capping, sinks, chunks)."""
    position, device = batch.position_ids[0], batch.position_ids.device
    pair, side = torch.zeros(2, len(position), dtype=torch.int32)
    for i, (start, rejected_start, p, c, r) in enumerate(batch.spans):
        pair[start : start + p + c] = pair[rejected_start : rejected_start + r] = i
        side[start + p : start + p + c], side[rejected_start : rejected_start + r] = 1, 2
    pair, side, index = pair.to(device), side.to(device), torch.arange(len(position), device=device)
    allowed = (pair[:, None] == pair) & (index[:, None] >= index) & ~((side[:, None] == 2) & (side == 1))
    distance = position[:, None] - position
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    seen = {"full_attention": allowed}
    if window:
        seen["sliding_attention"] = allowed & (distance < window)
    if chunk:
        seen["chunked_attention"] = allowed & (position[:, None] // chunk == position // chunk)
    masks = {
        kind: torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, torch.finfo(dtype).min)[
            None, None
        ]
        for kind, mask in seen.items()
    }
    if getattr(config, "layer_types", None):
        return {kind: masks[kind] for kind in set(config.layer_types)}
    return masks.get("sliding_attention", masks["full_attention"])


class _Probe:
    """Two pairs of random tokens, longer than the model's window where that stays cheap, and their right
    log-probabilities."""

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
        generator = torch.Generator().manual_seed(
            0
        )  # of its own: no run's random numbers may depend on the probe

        def tokens(n):
            return torch.randint(5, self.words, (n,), generator=generator).tolist()

        first = EncodedPair(0, tokens(prompt), tokens(9), tokens(7))
        self.pairs = [first, EncodedPair(1, tokens(5), tokens(3), tokens(6))]
        self.other = [first._replace(chosen=tokens(9)), self.pairs[1]]
        self.truth = self._separate()
        half = torch.is_autocast_enabled(self.device.type)
        dtype = torch.get_autocast_dtype(self.device.type) if half else self.scorer.model.dtype
        if not self.truth.isfinite().all():
            mend = {
                torch.float16: "set precision=float32, take a GPU that has bfloat16,",
                torch.bfloat16: "set precision=float32",
            }
            raise UserError(
                f"{str(dtype)[6:]} overflows in this model, or its weights are damaged: its log-probabilities are "
                f"not finite; {mend.get(dtype, 'load its weights anew')} or choose another base_model."
            )
        # In 16 bit even the right answer depends on how rows are batched; that noise is measured, and allowed for.
        self.tolerance = 1e-4
        if dtype != torch.float32:
            self.tolerance = 1e-2 + 4 * (self._separate(pad=3) - self.truth).abs().max().item()

    def _separate(self, pad: int = 0) -> Tensor:
        """Score each answer in a forward of its own, `pad` tokens of padding behind it."""
        return torch.cat(
            [self._alone(pair.prompt, answer, pad) for pair in self.pairs for answer in pair[2:]]
        )

    def _alone(self, prompt, answer, pad: int) -> Tensor:
        ids = torch.tensor([[*prompt, *answer, *[0] * pad]], device=self.device)
        mask = torch.tensor([[1] * (ids.shape[1] - pad) + [0] * pad], device=self.device)
        keep = len(answer) + 1 + pad  # not the logits of a prompt as long as a window
        logits = self.scorer.forward.original(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep
        ).logits[0]
        logps = torch.log_softmax(logits[-keep:][: len(answer)].float(), dim=-1)
        return logps.gather(1, ids[0, len(prompt) : ids.shape[1] - pad, None])[:, 0]

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
