"""Which layout a model takes, proven on the model itself, and the scorer that runs it in this layout.

It owns no kernel (attention.py), no output layer (head.py) and no rows (orpo/batching.py).
"""

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import UserError
from ..machine import is_out_of_memory
from ..orpo.batching import Batch, EncodedPair, collate
from ..orpo.body import sizes_of
from .attention import NAME, RowAttention, brief
from .head import ScoringForward

# (name, layout of batching.py, attention or None for the model's own), best first.
LADDER = (
    ("shared", "shared", NAME), ("shared, dense masks", "shared", "eager"),
    ("packed", "packed", None), ("padded", "padded", None),
)  # fmt: skip
# How many tokens back a layer looks, by all names that configs have for it.
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
WINDOWS += ("keep_window_size", "sliding_window_size")
# Those that a rung keeps at any length: its own masks, or rows in which a document lies in one piece.
KEPT = {"shared": WINDOWS[:1], "shared, dense masks": WINDOWS[:2], "packed": WINDOWS[:1], "padded": WINDOWS}


class PairScorer:
    """Runs batches through a causal LM in the best layout that it provably takes.

    Each rung of LADDER is tried on the model with random tokens, without gradient: log-probabilities must
    equal those of separate, unpadded forwards (equality), and must not move when another answer's tokens
    change (leak). Both are needed: ALiBi by index passes the second and fails the first. The model is tried
    as it will be trained: adapters, checkpointing, training mode but for what that draws at random; the leak
    in evaluation mode.

    Its attributes are those of `scoring.PlainScorer`; `rung` is a name in LADDER.

    Args:
        model: a transformers causal LM, unwrapped; its forward becomes a `head.ScoringForward`. UserError
            where no rung is right for it, or it sees the tokens that it is to predict.
        attention: what computes shared rows.
    """

    def __init__(self, model, attention: RowAttention | None = None):
        self.model, self.forward = model, ScoringForward(model)
        self.attention = attention or RowAttention()
        self.own_attention = model.config._attn_implementation
        try:
            self.prove()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            where = f"on {model.get_input_embeddings().weight.device} for a forward of 26 tokens"
            way_out = "choose a smaller base_model, or method=qlora"
            raise UserError(f"The weights leave no memory {where}: {way_out}.") from None

    def prove(self) -> None:
        """Choose the rung; call it again after anything that changes the forward. A RuntimeError where memory
        runs out says nothing of the model."""
        model, plain = self.model, self.forward.plain
        with torch.no_grad(), _as_trained(model):
            probe, self.refused = _Probe(self), {}
            self.attention.windows.clear()
            for self.rung, self.layout, implementation in LADDER:
                model.set_attn_implementation(implementation or self.own_attention)
                if not (why := probe.refusal()):
                    break
                self.refused[self.rung] = why
                self.forward.plain = plain
            else:
                raise UserError(
                    f"base_model is a {type(model).__name__}, which cannot be trained exactly (padded rows: "
                    f"{why}): choose another base_model."
                )
        self.proven = probe.said()

    @contextlib.contextmanager
    def inputs(self, batch: Batch) -> Iterator[dict]:
        """Give the keyword arguments with which the (possibly wrapped) model computes `batch`; its backward
        too belongs inside the block, after which ordinary attention holds again."""
        mask, row = batch.attention_mask, contextlib.nullcontext()
        if self.rung == "shared":
            # Not read; without it transformers would look for documents in the positions, and wait for it.
            mask, row = torch.ones_like(batch.input_ids), self.attention.over(batch)
        elif self.layout == "shared":
            mask = dense_masks(batch, self.model.config.get_text_config(), self.model.dtype)
        given = dict(input_ids=batch.input_ids, hidden_index=batch.hidden_index, targets=batch.targets)
        given |= {} if self.layout == "padded" else {"position_ids": batch.position_ids}
        with row:
            yield given | {"attention_mask": mask}

    def read(self, out: dict, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Give the log-probabilities (M,) float32 and the router loss, or None."""
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
        additive = torch.zeros_like(mask, dtype=dtype)
        seen[kind] = additive.masked_fill_(~mask, torch.finfo(dtype).min)[None, None]
    if getattr(config, "layer_types", None):
        return {kind: seen[kind] for kind in set(config.layer_types)}
    return seen.get("sliding_attention", seen["full_attention"])


@contextlib.contextmanager
def _as_trained(model) -> Iterator[None]:
    """Have a model in training mode, but without what it draws at random there: dropout, routers' jitter."""
    with contextlib.ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.train()
        for part in (*model.modules(), model.config, model.config.get_text_config(decoder=True)):
            kind = r"drop|jitter|^p$" if "Dropout" in type(part).__name__ else "drop|jitter"
            for name, share in list(vars(part).items()):
                if isinstance(share, float) and re.search(kind, name):
                    stack.callback(setattr, part, name, share)
                    setattr(part, name, 0.0)
        yield


class _Probe:
    """Two random pairs, longer than the model's windows where that is cheap, and their right scores."""

    def __init__(self, scorer: PairScorer):
        self.scorer, model = scorer, scorer.model
        self.device = model.get_input_embeddings().weight.device
        config = model.config.get_text_config(decoder=True)
        layers = {*(getattr(config, "layer_types", None) or ())}
        used = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}
        names = [name for name in WINDOWS if not layers or used.get(name, name) in {name, *layers}]
        self.windows = [(name, size) for name in names for size in sizes_of(config, name)]
        self.words = min(config.vocab_size, 1000)
        most = 4608 if self.device.type == "cuda" else 512
        positions = min(sizes_of(config, "max_position_embeddings"), default=10**9)
        # Some hold masks or numbers for that many tokens, and a row may be longer.
        held = positions <= 4096 and any(positions in table.shape for table in model.buffers())
        self.positions = positions if held else 0
        near = [size + 5 for _, size in self.windows if size + 5 <= min(most, positions - 9)]
        self.prompt = max(near, default=17)
        try:
            self._draw()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.prompt = 17
            self._draw()

    def said(self) -> str:
        """Say what was proven, of the rung that was taken."""
        scorer, longest = self.scorer, max((size for _, size in self.windows), default=0)
        head = "without logits" if scorer.forward.plain else "by the model's own logits"
        beyond = "within the probe" if longest < self.prompt else "longer than the probe"
        window = f", windows up to {longest:,} tokens ({beyond})" if longest else ""
        return (
            f"{scorer.rung} rows, head {head}, causal, {self.prompt + 9} tokens in {self.precision}"
            f"{window}, equal to separate forwards within {self.tolerance:.0e} nats"
        )

    def _draw(self) -> None:
        own = torch.Generator().manual_seed(0)  # no run's random numbers may depend on it
        lengths = self.prompt, 9, 7, 5, 3, 6, 9
        texts = [torch.randint(5, self.words, (n,), generator=own).tolist() for n in lengths]
        self.pairs = [EncodedPair(0, *texts[:3]), EncodedPair(1, *texts[3:6])]
        self.other = [self.pairs[0]._replace(chosen=texts[6]), self.pairs[1]]
        name = f"base_model is a {type(self.scorer.model).__name__}"
        try:
            self.truth, ahead = self._separate()
        except Exception as error:  # whatever it lacks: pixels, sound, a length of some multiple
            if is_out_of_memory(error):
                raise
            why = f"which does not compute a plain text ({brief(error)}): choose another base_model"
            raise UserError(f"{name}, {why}.") from None
        half = torch.is_autocast_enabled(self.device.type)
        dtype = torch.get_autocast_dtype(self.device.type) if half else self.scorer.model.dtype
        self.precision = str(dtype)[6:]
        if not self.truth.isfinite().all():
            mend = "load its weights anew" if dtype == torch.float32 else "set precision=float32"
            mend += ", take a GPU that has bfloat16," * (dtype == torch.float16)
            raise UserError(
                f"{self.precision} overflows in this model, or its weights are damaged: "
                f"its log-probabilities are not finite; {mend} or choose another base_model."
            )
        # In 16 or 8 bit the truth too depends on how rows are batched; that noise is measured.
        self.tolerance = 1e-4
        if dtype != torch.float32 or getattr(self.scorer.model, "is_quantized", False):
            self.tolerance = 1e-2 + 4 * (self._separate(pad=3)[0] - self.truth).abs().max().item()
        if not ahead <= self.tolerance:
            way_out = "choose a causal language model (an encoder needs is_decoder=true in its config.json)"
            why = f"{name} that sees the tokens it is to predict, so it is not causal"
            raise UserError(f"{why}: {way_out}.")

    def _separate(self, pad: int = 0) -> tuple[Tensor, float]:
        """Score each answer in a forward of its own, `pad` tokens of padding behind it; give the scores, and
        by how much what follows a prompt moves what is predicted for its first token."""
        found, first = [], []
        for pair in self.pairs:
            for answer in pair[2:]:
                end = len(pair.prompt) + len(answer)
                ids = torch.tensor([[*pair.prompt, *answer, *[0] * pad]], device=self.device)
                mask = (torch.arange(end + pad, device=self.device) < end).long()[None]
                last = len(answer) + 1 + pad  # not the logits of a prompt as long as a window
                options = dict(attention_mask=mask, use_cache=False, logits_to_keep=last)
                logits = self.scorer.forward.original(input_ids=ids, **options).logits[0, -last:]
                logps = torch.log_softmax(logits[: len(answer)].float(), dim=-1)
                found.append(logps.gather(1, ids[0, len(pair.prompt) : end, None])[:, 0])
                first.append(logps[0, pair.chosen])
        moved = [(a - b).abs().max().item() for a, b in zip(first[::2], first[1::2], strict=True)]
        return torch.cat(found), max(moved)

    def refusal(self) -> str:
        """Say why the scorer's present rung is wrong for the model; nothing if it is right."""
        scorer = self.scorer
        beyond = {name: size for name, size in self.windows if size >= self.prompt}
        if lost := next((name for name in beyond if name not in KEPT[scorer.rung]), None):
            return f"{lost} {beyond[lost]} is longer than what is tried"
        why = self._tried()
        if why and scorer.forward.plain:
            scorer.forward.plain = False  # perhaps it is only the head that is not what it seems
            why = self._tried() and why
        if not why and scorer.rung == "shared" and not scorer.attention.windows.issuperset(beyond.values()):
            return f"its attention is not told of {max(beyond, key=beyond.get)} {max(beyond.values())}"
        return why

    def _tried(self) -> str:
        model, rest = self.scorer.model, slice(len(self.pairs[0].chosen), None)
        try:
            off = (self._scored(self.pairs) - self.truth).abs().max().item()
            if not off <= self.tolerance:  # NaN is no agreement
                return f"differs from separate forwards by {off:.2g} nats"
            model.eval()
            leak = (self._scored(self.other) - self.truth)[rest].abs().max().item()
            if not leak <= self.tolerance:
                return f"one answer leaks into another ({leak:.2g} nats)"
            if self.positions and self.scorer.layout != "padded":
                self._scored([EncodedPair(i, *[[5] * 16] * 3) for i in range(self.positions // 48 + 1)])
            return ""
        except Exception as error:  # whatever a model raises at an unusual row, it means: not this one
            return brief(error)
        finally:
            model.train()

    def _scored(self, pairs: list[EncodedPair]) -> Tensor:
        return self.scorer.logps(collate(pairs, layout=self.scorer.layout).to(self.device))
