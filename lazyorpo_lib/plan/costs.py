"""What one method costs on one device: memory and minutes of any split of a step, and the best split.

Memory is what simulation.py finds for a step, plus weights, optimizer state and framework; minutes are
operations over a rate, bytes over a bandwidth, and on a GPU no less than the launches take. No run has
checked what is CUDA's own: CUDA_CONTEXT_GIB, FRAGMENTATION, LAUNCH, HOST_LINK.
"""

import functools
import math
from dataclasses import dataclass

import psutil
import torch

from ..errors import UserError
from ..fast.attention import takes_sdpa
from ..machine import GIB, Machine
from ..model import about_adapters, add_adapters
from ..orpo.batching import EncodedPair
from ..orpo.best import Best
from ..orpo.body import fused_experts, is_within, sizes_of, text_layers, towers_of
from ..orpo.data import held_out_of
from ..settings import Settings
from .cards import link_rate, rates
from .profile import Profile
from .simulation import on_meta, quantised_layers, simulate

MARGIN = 0.08  # share of the memory that a plan leaves free
CUDA_CONTEXT_GIB = 0.5  # context 0.35 to 0.45, cuBLAS workspace 0.03 to 0.1; not in torch's own count
CPU_GROWTH_GIB = 0.02  # of the process in its first steps: threads, new kernels; 0.013 to 0.018 measured
FRAGMENTATION = {"cuda": 0.05, "mps": 0.05, "cpu": 0.03}  # of what comes and goes in a step
LAUNCH = 8e-6  # seconds in which Python and torch start one operation on a GPU
APPLE_SHARE = 0.75  # of the RAM may be the GPU's working set
HOST_LINK = 12e9  # bytes a second between card and host, for paged optimizers
DISK = 0.5e9  # bytes a second that a checkpoint is written with; a rented machine's volume, often slower


@dataclass(frozen=True)
class MethodPlan:
    """One method: its peak and the parts that sum to it (GiB), the time and the arithmetic behind it, the
    split of a step, a checkpoint, the optimizer that is meant."""

    method: str
    peak_gib: float
    parts: dict[str, float]
    minutes: float
    fits: bool
    tokens_per_batch: int
    checkpointed_layers: int
    layers: int
    checkpoint_gib: float
    checkpoint_seconds: float
    arithmetic: tuple[str, ...]
    optimizer: str


class _Shape:
    """Parameters of the whole model, by what is done with them."""

    def __init__(self, config, settings: Settings):
        def largest(*names: str, default: int = 1) -> int:
            return max(sizes_of(config, *names), default=default)

        def count(weights) -> int:
            return sum(w.numel() for w in weights)

        model = on_meta(config, torch.float32)
        named, beside = dict(model.named_parameters()), towers_of(model)  # tied ones once
        embedding = model.get_input_embeddings().weight
        head = getattr(model.get_output_embeddings(), "weight", embedding)
        self.total, self.largest = count(named.values()), max(p.numel() for p in named.values())
        self.text = count(p for name, p in named.items() if not is_within(name, beside))
        self.bulk = count(m.weight for m in quantised_layers(model))
        self.experts = count(fused_experts(model))  # never in 4 bit
        experts = largest("num_local_experts", "num_experts", "n_routed_experts")
        used = min(1.0, largest("num_experts_per_tok") / experts)
        self.active = self.bulk + round(used * self.experts)  # for one token
        self.embeddings = count(m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding))
        self.head = head.numel()
        self.untied = 0 if head is embedding else embedding.numel()  # in embeddings that are not the head too
        # Numbers in adafactor's row and column averages.
        self.factored = sum(sum(p.shape) if p.dim() == 2 else p.numel() for p in named.values())
        self.layers = largest("num_hidden_layers", default=len(text_layers(model)) or 1)
        heads = largest("num_attention_heads")
        self.attention_width = heads * largest("head_dim", default=embedding.shape[1] // heads)
        self.dense = not takes_sdpa(model)  # attention of every token of a row with every other
        self.adapters, self.about_adapters, self.refusal = 0, "", None
        try:  # last: it changes the model
            with torch.device("meta"):
                adapted = add_adapters(model, settings)
            self.adapters = count(p for p in adapted.parameters() if p.requires_grad)
            self.about_adapters = about_adapters(adapted)
        except UserError as why:  # which is no matter of full tuning
            self.refusal = why


# A panel plans again at every change, and few changes need a new simulation.
_shapes: dict[tuple, _Shape] = {}
_profiles: dict[tuple, Profile] = {}


class Costs:
    """One method on one device, or on several `cards`, each of which holds all or, `sharded`, its part of
    weights, gradients and optimizer state."""

    def __init__(self, config, settings, machine: Machine, lengths, dtype, method, cards=1, sharded=True):
        self.config, self.settings, self.machine, self.lengths = config, settings, machine, lengths
        self.dtype, self.method, self.cards = dtype, method, cards
        self.holders = cards if sharded else 1  # that share one copy
        self.cuda, self.full = machine.device == "cuda", method == "full"
        self.key = config.to_json_string(), settings.lora_rank, settings.lora_dropout > 0
        self.shape = _shapes[self.key] = _shapes.get(self.key) or _Shape(config, settings)
        if self.shape.refusal and settings.method == method != "full":
            raise self.shape.refusal
        four_bit = (getattr(config, "quantization_config", None) or {}).get("load_in_4bit")
        self.held = "qlora" if four_bit and method == "lora" else method  # how the weights are
        self.trained = self.shape.text if self.full else self.shape.adapters
        self.weights = self._weights()
        self.pairs = max(1, math.ceil(settings.pairs_per_step / cards))  # of a step on one card
        # Eight random pairs are rarely half as long again as eight mean ones.
        self.most = max(lengths.longest, round(self.pairs * min(lengths.longest, 1.5 * lengths.mean)), 16)
        self.rate, self.bandwidth, self.rate_source = rates(machine, dtype)
        self.memory = machine.memory_gib * GIB * (APPLE_SHARE if machine.device == "mps" else 1)
        self.limit = self.memory * (1 - MARGIN) / GIB
        if machine.free_gib is not None:  # counted when this process had its context already
            self.limit = min(self.limit, machine.free_gib + CUDA_CONTEXT_GIB)
        here = psutil.Process().memory_info().rss + CPU_GROWTH_GIB * GIB
        self.framework = CUDA_CONTEXT_GIB * GIB if self.cuda else here

    @functools.cached_property
    def profile(self) -> Profile:
        """Simulate from the fewest to the most tokens that a micro-batch may have, each time with at most
        three times as many: between two such counts a line is near enough, wherever the head's blocks bend
        it, and past 30,000 tokens nothing bends."""
        lengths, machine, settings = self.lengths, self.machine, self.settings
        low = lengths.longest if lengths.longest < self.most else max(64, self.most // 2)
        high = min(max(self.most, 128), max(2 * low, 30_000))
        parts = max(2 if self.shape.dense else 1, math.ceil(math.log(high / low, 3)))
        points = [round(low * (high / low) ** (k / parts)) for k in range(parts + 1)]
        if machine.device == "mps":  # holds all attention scores, so pairs must be as long as they are
            points = [round(lengths.mean), 2 * round(lengths.mean)]
        rows, lengths_of = [], (lengths.prompt, lengths.chosen, lengths.rejected)
        for tokens in points:  # a GPU's kernels do not care how long a pair is
            count = 1 if self.cuda else max(1, round(tokens / lengths.mean))
            pair = [[1] * max(1, round(part / lengths.mean * tokens / count)) for part in lengths_of]
            rows.append([EncodedPair(i, *pair) for i in range(count)])
        key = self.key[: 1 if self.full else 3], self.held, self.dtype, machine.device, settings.nll_over
        key += machine.capability[0] >= 8, self.holders > 1
        key += tuple((len(row), *map(len, row[0][1:])) for row in rows)
        if key not in _profiles:
            what = self.held, self.dtype, machine, rows, self.holders > 1
            _profiles[key] = simulate(self.config, settings, *what)
        return _profiles[key]

    def _weights(self) -> float:
        shape, size = self.shape, self.dtype.itemsize
        if self.full:
            return 4.0 * shape.total
        if self.held == "lora":
            return float(size * shape.total)
        # NF4: 4 bits, an 8-bit scale for each 64 weights, a float32 one for each 256 scales.
        return shape.bulk * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + size * (shape.total - shape.bulk)

    def optimizer(self, name: str = "") -> tuple[float, float, float]:
        """Count bytes of its state on the device, of state that may leave it, of what an update holds."""
        name, n = name or self.settings.optimizer, self.trained
        if name == "adafactor":
            return 4.0 * (self.shape.factored if self.full else n / 8), 0.0, 12.0 * min(self.shape.largest, n)
        kept = self.shape.embeddings if self.full else 0  # in 32 bit by 8-bit optimizers too
        state = 2.03 * (n - kept) + 8.0 * kept if "8bit" in name else 8.0 * n
        return (0.0, state, 0.0) if name.startswith("paged") and self.cuda else (state, 0.0, 0.0)

    def parts(self, tokens: int, checkpointed: int) -> dict[str, float]:
        """Give the peak by part, GiB."""
        lengths, full = self.lengths, self.full
        tokens = min(max(tokens, lengths.longest), self.most)  # a longer pair has a micro-batch of its own
        # Held from one micro-batch to the next; adapters' and sharded gradients are counted so throughout.
        held = not full or tokens < self.most or self.holders > 1
        gradients = 4.0 * self.trained / self.holders
        peak, head, made = self.profile.peak(tokens, self.shape.layers, checkpointed, held)
        if not self.cuda:  # the masks of the rejected answers, which only the CPU's kernel wants
            masks = lengths.rejected * (lengths.prompt + lengths.rejected) / lengths.mean
            peak += tokens * masks * self.dtype.itemsize
        activations, made = peak - head - made, gradients if held else made
        state, _, passing = (size / self.holders for size in self.optimizer())
        if gradients + passing > activations + head + made:  # the optimizer's own moment, activations gone
            activations, head, made = passing, 0.0, gradients
        parts = {
            "weights": self.weights / self.holders,
            "adapters": 0.0 if full else gradients,
            "gradients": made,
            "optimizer": state,
            "activations": activations,
            "head": head,
            "framework": self.framework + FRAGMENTATION[self.machine.device] * (activations + head),
        }
        if self.holders > 1:  # what FSDP gathers: embeddings and head, the layer at work and the next
            ends, size = self.shape.head + self.shape.untied, self.dtype.itemsize
            layer = (self.shape.total - ends) / self.shape.layers
            # With full tuning their gradients too, until they are summed over the cards, in float32.
            summed = size * (ends + layer) + 4.0 * layer if full else 0.0
            parts["gathered"] = size * (ends + 2 * layer) + summed
        return {name: value / GIB for name, value in parts.items()}

    def _sent(self, batches: int) -> float:
        """Count the bytes that a card sends in a step: what is trained, summed over the cards in float32; of
        shared weights also each, gathered for forward and backward of every micro-batch."""
        share, trained = 1 - 1 / self.cards, 4.0 * self.trained
        if self.holders == 1:
            return 2 * share * trained  # added up in parts, and the sums handed round
        return batches * share * (2 * self.dtype.itemsize * self.shape.total + trained)

    def peak(self, tokens: int, checkpointed: int) -> float:
        """Give the peak, GiB."""
        return sum(self.parts(tokens, checkpointed).values())

    def _operations(self, row: float, again: float) -> tuple[float, float, float, float]:
        """Count the operations for a pair: in the layers, in attention's scores, in the head; of its
        evaluation. `row`: tokens of its micro-batch; `again`: share of the layers that run twice."""
        lengths, shape = self.lengths, self.shape
        p, c, r = lengths.prompt, lengths.chosen, lengths.rejected
        # Layers: forward and gradients of activations, with full tuning of weights too.
        forward = 2.0 * lengths.mean * (shape.active + (0 if self.full else shape.adapters))
        seen = row * lengths.mean if shape.dense else (p + c) ** 2 / 2 + r * p + r * r / 2
        scores = 4.0 * seen * shape.attention_width * shape.layers
        scored = c + r + (p if self.settings.nll_over != "answer" else 0)
        head = (8.0 if self.full else 4.0) * scored * shape.head  # head.py: recomputed, or kept as a Jacobian
        # Flash attention's backward is 2.5 forwards.
        layers = forward * ((3 if self.full else 2) + again)
        return layers, scores * (3.5 + again), head, forward + scores + head / 2

    def minutes(self, tokens: int, checkpointed: int) -> tuple[float, tuple[str, ...]]:
        """Give the minutes of the run, and the arithmetic behind them."""
        settings, lengths, shape, size = self.settings, self.lengths, self.shape, self.dtype.itemsize
        again = checkpointed / shape.layers
        # First-fit leaves about a tenth of a budget empty where a step does not go in at once.
        batches = math.ceil(self.pairs * lengths.mean / tokens * (1.1 if tokens < self.most else 1))
        row = self.pairs * lengths.mean / batches
        layers, scores, head, evaluated = self._operations(row, again)
        pair = layers + scores + head
        moved, launches = self.profile.work(row, shape.layers, checkpointed)
        if not self.cuda:  # all but the weights is in the share of the rate that is measured
            all_of, bulk = size * shape.total, (0.5 + 2 * size) * shape.bulk
            weights = {"full": 4 * shape.total + all_of, "lora": all_of, "qlora": bulk}
            moved, launches = weights[self.held] * (2 + again), 0.0
        computing = self.pairs * pair / self.rate
        moving = (batches * moved + 28.0 * self.trained / self.holders) / self.bandwidth
        waiting = max(0.0, batches * launches * LAUNCH - computing - moving)
        paged = self.optimizer()[1] / self.holders
        over = self.peak(tokens, checkpointed) * GIB + paged - self.memory  # leaves and comes back in a step
        paging = 2 * min(max(over, 0.0), paged) / HOST_LINK
        sent = self._sent(batches)
        sending = sent / link_rate(self.machine, self.cards)
        step = max(computing + moving + waiting, sending) + paging
        steps = math.ceil(settings.epochs * lengths.pairs / settings.pairs_per_step)
        steps = max(1, min(steps, settings.max_steps or steps))
        held_out = held_out_of(lengths.pairs * 5 // 4, settings.eval_pairs)
        best = Best(settings, steps, held_out)
        looks = best.every and steps // best.every
        asked = (2 + looks / best.stride) * held_out / self.pairs
        evaluation = asked * evaluated / pair * (step - paging)
        about = f"; meanwhile a card sends {sent / 1e9:.3g} GB in {sending:.3g} s" * (self.cards > 1)
        total, passes = (steps * step + evaluation) / 60, (3 if self.full else 2) + again
        return total, (
            f"{lengths.pairs:,} pairs ({lengths.source}); a pair: {lengths.mean:.0f} tokens, "
            f"{pair / 1e12:.3g} TFLOP (layers {layers / 1e12:.3g} in {passes:.2f} passes, "
            f"attention {scores / 1e12:.3g}, head {head / 1e12:.3g})",
            f"a step: {self.pairs} pairs in {batches} micro-batches, {step:.3g} s (computing {computing:.3g} "
            f"at {self.rate / 1e12:.3g} TFLOP/s, {self.rate_source}; moving bytes {moving:.3g} at "
            f"{self.bandwidth / 1e9:.3g} GB/s; waiting for launches {waiting:.3g}; "
            f"paging optimizer state {paging:.3g})" + about,
            f"the run: {steps} steps x {step:.3g} s + {2 + looks} evaluations in {evaluation:.3g} s = "
            f"{total:.3g} min, without the answers written for comparison and the checkpoints",
        )

    def best(self) -> MethodPlan:
        """Choose the quickest split that fits, of equally quick ones the larger budget; else the smallest."""
        settings, layers, longest = self.settings, self.shape.layers, self.lengths.longest
        budgets, counts = [settings.tokens_per_batch], [settings.checkpointed_layers]
        if budgets == ["auto"]:
            budgets = [round(self.most * (longest / self.most) ** (i / 12)) for i in range(13)]
        counts = range(layers + 1) if counts == ["auto"] else [min(*counts, layers)]
        # More recomputing than needed pays only where it keeps paged state on the card.
        fitting, most = [], None if self.optimizer()[1] else 1
        for budget in dict.fromkeys(budgets):
            fitting += [(budget, n) for n in counts if self.peak(budget, n) <= self.limit][:most]
        times = {split: self.minutes(*split)[0] for split in fitting}
        quickest = 1.001 * min(times.values(), default=0.0)
        split = next((s for s in fitting if times[s] <= quickest), (budgets[-1], counts[-1]))
        parts, (minutes, lines) = self.parts(*split), self.minutes(*split)
        weights, state = 4.0 * self.trained, sum(self.optimizer()[:2])
        gib, seconds = (weights + state) / GIB, (weights + state) / DISK
        said = f"weights {weights / GIB:.3g}, optimizer {state / GIB:.3g}"
        lines += (f"a checkpoint: {gib:.3g} GiB ({said}), {seconds:.3g} s at {DISK / 1e9:g} GB/s of disk",)
        given = self.method, sum(parts.values()), parts, minutes, bool(fitting), *split, layers, gib, seconds
        return MethodPlan(*given, lines, settings.optimizer)
