"""Will it fit, and how long will it take: answered from a model's config.json, before anything else is downloaded.

Memory is what simulation.py finds for a step, plus weights, optimizer state and framework; minutes are operations over a rate,
bytes over a bandwidth, and on a GPU no less than the launches take. Of the ways to split a step the quickest that fits is chosen.
Peaks are checked against real runs on the CPU (tests/benchmarks/planner_check.py). What is CUDA's own is a stated constant that no
run has checked: CUDA_CONTEXT_GIB, FRAGMENTATION, a card's share, COPY_SHARE, LAUNCH, HOST_LINK. It loads no weights and knows
neither the links between several GPUs nor the time of writing answers and checkpoints.
"""

import functools
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import psutil
import torch

from ..errors import UserError
from ..fast.attention import takes_sdpa
from ..machine import Machine, check_apple, pick_precision
from ..orpo.batching import EncodedPair
from ..session import duration
from ..settings import Settings
from .simulation import Profile, adapted_layers, on_meta, simulate

METHODS = ("full", "lora", "qlora")  # strongest first
MARGIN = 0.08  # share of the memory that a plan leaves free
CUDA_CONTEXT_GIB = 0.5  # context 0.35 to 0.45, cuBLAS workspace 0.03 to 0.1; not in torch's own count
CPU_GROWTH_GIB = 0.02  # of the process in its first steps, tensors apart: threads, kernels made at run time; 0.013 to 0.018 measured
FRAGMENTATION = {"cuda": 0.05, "mps": 0.05, "cpu": 0.03}  # of what comes and goes in a step
COPY_SHARE = 0.85  # of a card's bandwidth, reached by operations that are no products
LAUNCH = 8e-6  # seconds in which Python and torch start one operation on a GPU
MEASURED_SHARE = {
    "cuda": 0.9,
    "mps": 0.65,
    "cpu": 0.65,
}  # of one large product timed here; off CUDA that covers all of a step
APPLE_SHARE = 0.75  # of the RAM may be the GPU's working set
HOST_LINK = 12e9  # bytes a second between card and host, for paged optimizers
DISK = 0.5e9  # bytes a second that a checkpoint is written with; a rented machine's volume, often slower
FULL_LEARNING_RATE = 1e-5  # above it full tuning is not taken unasked: it would destroy the model
GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet. Memory as the driver reports it, GiB; dense TFLOP/s in 16 bit (summed in 32) and in 32; GB/s."""

    name: str
    memory_gib: float
    tflops_16: float
    tflops_32: float
    bandwidth: float
    capability: tuple[int, int]
    share: float = 0.7  # of the TFLOP/s, reached by large products

    @property
    def machine(self) -> Machine:
        return Machine("cuda", self.name, self.memory_gib, self.capability)


CARDS = {
    card.name: card
    for card in (
        Card("T4", 14.7, 65, 8.1, 320, (7, 5), 0.37),  # throttles at 70 W
        Card("P100", 15.9, 18.7, 9.3, 732, (6, 0)),  # no tensor cores
        Card("V100-16", 15.8, 112, 14, 900, (7, 0)),
        Card("V100-32", 31.7, 112, 14, 900, (7, 0)),
        Card("L4", 22.0, 121, 30.3, 300, (8, 9), 0.5),  # throttles at 72 W
        Card("A10", 22.0, 125, 31.2, 600, (8, 6)),
        Card("RTX-3090", 23.7, 71, 35.6, 936, (8, 6)),
        Card("RTX-4090", 23.6, 165.2, 82.6, 1008, (8, 9)),
        Card("RTX-5090", 31.4, 209.5, 104.8, 1792, (12, 0)),
        Card("A40", 44.4, 150, 37.4, 696, (8, 6)),
        Card("L40S", 44.4, 362, 91.6, 864, (8, 9)),
        Card("A6000", 47.5, 155, 38.7, 768, (8, 6)),
        Card("A100-40", 39.4, 312, 19.5, 1555, (8, 0)),
        Card("A100-80", 79.1, 312, 19.5, 2039, (8, 0)),
        Card("H100", 79.1, 989, 67, 3350, (9, 0)),
        Card("H100-PCIe", 79.1, 756, 51, 2000, (9, 0)),
        Card("H100-NVL", 93.1, 835, 60, 3900, (9, 0)),
        Card("H200", 139.8, 989, 67, 4800, (9, 0)),
        Card("B200", 178.4, 2250, 75, 8000, (10, 0)),
    )
}


def _kind(name: str) -> tuple[set[str], list[float]]:
    """The words of a card's name that tell it from others, and the GiB that it names."""
    words = re.sub(r"nvidia|tesla|geforce|rtx|sxm\d?|hbm\d\w?|gb\b|[\s_-]+", " ", name.lower()).split()
    sizes = {word for word in words if word.isdigit() and len(word) < 4}
    return set(words) - sizes, list(map(float, sizes))


def _listed(name: str, *sizes: float) -> Card | None:
    """The card of CARDS with this name, as people or its driver write it, if its memory is of `sizes` and what the name says."""
    words, named = _kind(name)
    fitting = [
        card
        for card in CARDS.values()
        if all(abs(size - card.memory_gib) <= 0.1 * size for size in (*sizes, *named))
    ]
    found = [
        card for card in fitting if _kind(card.name)[0] <= words <= _kind(card.name)[0] | {"pcie"}
    ]  # of most cards both are alike
    return max(found, key=lambda card: len(_kind(card.name)[0]), default=None)


def find_card(name: str) -> Card | Machine:
    """A card of CARDS by name, as people or its driver write it; or `cpu` or `apple`, with GiB of RAM behind a dash or else this
    machine's.

    Raises:
        UserError: no such name.
    """
    if card := _listed(name):
        return card
    if match := re.fullmatch(r"(cpu|apple)(?:[ -](\d+)(?: ?gb)?)?", name.strip().lower()):
        ram = float(match[2] or psutil.virtual_memory().total / GIB)
        return Machine("cpu", "CPU", ram) if match[1] == "cpu" else Machine("mps", "Apple GPU", ram)
    raise UserError(f"device is {name!r}, but must be one of {', '.join(CARDS)}, cpu-<GiB> or apple-<GiB>.")


# How long the pairs are.


@dataclass(frozen=True)
class Lengths:
    """Of the training pairs: how many, mean tokens of their parts, tokens of the longest pair with its prompt once."""

    pairs: int
    prompt: float
    chosen: float
    rejected: float
    longest: int
    source: str = "the dataset"

    @property
    def mean(self) -> float:
        return self.prompt + self.chosen + self.rejected


def measured_lengths(pairs: Sequence[EncodedPair]) -> Lengths:
    """Of pairs already encoded."""
    n = max(len(pairs), 1)
    parts = [sum(len(pair[i]) for pair in pairs) / n for i in (1, 2, 3)]
    return Lengths(len(pairs), *parts, max((pair.tokens() for pair in pairs), default=16))


# Tokens of (prompt, chosen, rejected) in a 49k vocabulary: every tenth, by length, of 300 pairs of dpo-mix-7k's sources.
_MIX = (
    (103, 5, 30), (104, 93, 8), (56, 24, 179), (48, 48, 237), (73, 196, 93), (95, 218, 142), (52, 342, 117),
    (484, 73, 5), (481, 109, 6), (480, 68, 76), (277, 129, 278), (100, 187, 436), (657, 15, 116), (63, 575, 214),
    (47, 550, 301), (98, 531, 343), (85, 495, 444), (164, 438, 502), (507, 257, 455), (608, 314, 384), (48, 647, 703), (732, 384, 345),
    (739, 414, 386), (891, 314, 446), (775, 351, 584), (1237, 98, 474), (831, 395, 679), (1180, 411, 525),
    (1300, 494, 511), (1551, 411, 604),
)  # fmt: skip
_KNOWN = {
    "demo": (264, ((45, 30, 30),)),
    "argilla/dpo-mix-7k": (6750, _MIX),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (60917, _MIX),
    "HuggingFaceH4/ultrafeedback_binarized": (61135, _MIX),
}


def preset_lengths(dataset: str, settings: Settings) -> Lengths:
    """Of a dataset not yet downloaded: its published size, lengths of a sample, under the settings' limits. One that is not
    known is taken for 7,000 pairs as long as argilla/dpo-mix-7k's, and `source` says so."""
    name = dataset.split(":")[0]
    pairs, sample = _KNOWN.get(name, (7000, _MIX))
    lengths = f"lengths of {name}" if sample is not _MIX else "as long as argilla/dpo-mix-7k's, by a sample"
    source = f"{'known' if name in _KNOWN else 'a guess'}: {pairs:,} pairs, {lengths}"
    kept = []
    for p, c, r in sample:
        if settings.overlong == "truncate":
            p = min(p, settings.max_prompt_tokens)
            kept.append((p, min(c, settings.max_tokens - p), min(r, settings.max_tokens - p)))
        elif p <= settings.max_prompt_tokens and p + max(c, r) <= settings.max_tokens:
            kept.append((p, c, r))
    share = len(kept) / len(sample)
    kept = kept or [(settings.max_tokens // 3,) * 3]
    pairs = max(1, round(min(pairs, settings.max_pairs or pairs) * share) - settings.eval_pairs)
    # Real data has a longer tail than the sample; no pair is longer than two answers that fill the limit.
    longest = min(round(1.25 * max(map(sum, kept))), 2 * settings.max_tokens)
    return Lengths(pairs, *(sum(x) / len(kept) for x in zip(*kept, strict=True)), longest, source)


# What a model is made of.


@dataclass(frozen=True)
class _Shape:
    """Parameters of the whole model. `bulk`: in the layers that are adapted and quantised; `active`: used for one token."""

    total: int
    bulk: int
    active: int
    head: int
    untied: int  # in input embeddings that are not the head too
    embeddings: int
    adapters: int
    largest: int
    factored: int  # numbers in adafactor's row and column averages
    layers: int
    attention_width: int
    dense: bool  # attention in eager code, of every token of a row with every other


def _shape(config, rank: int) -> _Shape:
    model, text = on_meta(config, torch.float32), config.get_text_config()
    parameters = dict(model.named_parameters())  # tied ones once
    adapted = [tuple(m.weight.shape) for m in adapted_layers(model)]
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings() or embeddings
    experts = next(
        (
            n
            for name in ("num_local_experts", "num_experts", "n_routed_experts")
            if (n := getattr(text, name, 0))
        ),
        1,
    )
    used = min(1.0, (getattr(text, "num_experts_per_tok", None) or 1) / experts)
    bulk = sum(a * b for a, b in adapted)
    heads = getattr(text, "num_attention_heads", None) or 0
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // max(heads, 1)
    return _Shape(
        total=sum(p.numel() for p in parameters.values()),
        bulk=bulk,
        active=bulk + round(used * sum(p.numel() for p in parameters.values() if p.dim() == 3)),
        head=head.weight.numel(),
        untied=0 if head.weight is embeddings.weight else embeddings.weight.numel(),
        embeddings=sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)),
        adapters=sum(rank * (a + b) for a, b in adapted),
        largest=max(p.numel() for p in parameters.values()),
        factored=sum(sum(p.shape) if p.dim() == 2 else p.numel() for p in parameters.values()),
        layers=text.num_hidden_layers,
        attention_width=heads * head_dim,
        dense=not takes_sdpa(model),
    )


# A panel plans again at every change, and few changes need a new simulation.
_shapes: dict[tuple, _Shape] = {}
_profiles: dict[tuple, Profile] = {}


def _profile(
    config,
    settings: Settings,
    method: str,
    dtype,
    machine: Machine,
    lengths: Lengths,
    shape: _Shape,
    most: int,
    sharded: bool,
) -> Profile:
    """Simulated from the fewest to the most tokens that a micro-batch may have, each time with at most three times as many: between
    two such counts a line is near enough, wherever the head's blocks bend it, and past 30,000 tokens nothing bends."""
    shares = [part / lengths.mean for part in (lengths.prompt, lengths.chosen, lengths.rejected)]
    low = lengths.longest if lengths.longest < most else max(64, most // 2)
    high = min(max(most, 128), max(2 * low, 30_000))
    parts = max(2 if shape.dense else 1, math.ceil(math.log(high / low, 3)))
    points = [round(low * (high / low) ** (k / parts)) for k in range(parts + 1)]
    if machine.device == "mps":  # holds all attention scores, so pairs must be as long as they are
        points = [round(lengths.mean), 2 * round(lengths.mean)]
    rows = []
    for tokens in points:
        count = (
            max(1, round(tokens / lengths.mean)) if machine.device != "cuda" else 1
        )  # whose kernels do not care how long a pair is
        prompt, chosen, rejected = (max(1, round(share * tokens / count)) for share in shares)
        rows.append([EncodedPair(i, [1] * prompt, [1] * chosen, [1] * rejected) for i in range(count)])
    key = (
        config.to_json_string(), method, dtype, machine.device, machine.capability[0] >= 8, settings.lora_rank,
        settings.lora_dropout > 0, settings.nll_over, sharded, *(len(part) for row in rows for part in row[0][1:]),
    )  # fmt: skip
    if key not in _profiles:
        _profiles[key] = simulate(config, settings, method, dtype, machine, rows, sharded)
    return _profiles[key]


# How fast.


@functools.lru_cache(maxsize=8)
def _timed(device: str, dtype) -> tuple[float, float]:
    """Operations a second of a product of random matrices on the machine at hand (of equal numbers it is quicker), bytes of a copy."""
    n, seconds = 768 if device == "cpu" else 4096, []
    a, large = (
        torch.randn(n, n, dtype=dtype, device=device),
        torch.zeros(16 * n * n, dtype=torch.uint8, device=device),
    )
    for work in [lambda: (a @ a)[0, 0].item()] * 5 + [lambda: large.clone()[0].item()] * 5:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds[:5]), 2 * large.numel() / min(seconds[5:])


def _rates(machine: Machine, card: Card | None, dtype) -> tuple[float, float, str]:
    """Operations and bytes a second that a step may count on, and where the first comes from."""
    if card is None and machine.device == "cuda":
        card = _listed(machine.name, machine.memory_gib)
    if card is not None:
        peak = card.tflops_32 if dtype == torch.float32 else card.tflops_16
        return (
            peak * 1e12 * card.share,
            card.bandwidth * 1e9 * COPY_SHARE,
            f"{card.name}: {peak:g} TFLOP/s x {card.share:g}",
        )
    if machine.device == "mps" and not torch.backends.mps.is_available():
        return 3e12 * 0.45, 100e9, "an Apple GPU, assumed: 3 TFLOP/s x 0.45"
    share, (rate, copied) = MEASURED_SHARE[machine.device], _timed(machine.device, dtype)
    return (
        rate * share,
        {"cpu": 10e9, "mps": 100e9, "cuda": copied}[machine.device],
        f"timed here: {rate / 1e12:.3g} TFLOP/s x {share:g}",
    )


# The plan.


@dataclass(frozen=True)
class MethodPlan:
    """One method: its peak and the parts that sum to it (GiB), the time and the arithmetic behind it, the split of a step; a checkpoint."""

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


@dataclass(frozen=True)
class Plan:
    """Every method on one device; which is chosen and why; where that one does not fit, the nearest changes that would."""

    device: str
    memory_gib: float
    methods: list[MethodPlan]
    chosen: str
    why: str
    changes: list[str]
    dtype: str
    lengths: Lengths

    @property
    def method(self) -> MethodPlan:
        """The chosen one."""
        return next(m for m in self.methods if m.method == self.chosen)

    def as_dict(self) -> dict:
        """Ready for JSON: device, memory_gib, methods, chosen, why, changes, dtype, lengths."""
        return asdict(self)

    def line(self) -> str:
        """In one line, for the panel."""
        m = self.method
        verdict = "fits" if m.fits else "does not fit" + (f"; {self.changes[0]}" if self.changes else "")
        device = "CPU" if self.device.startswith("CPU") else self.device
        return f"{m.peak_gib:.1f} of {self.memory_gib:.1f} GiB, about {duration(m.minutes)} on this {device}: {verdict}"

    def table(self) -> str:
        """As text, a line for each method; the chosen one has a star."""
        rows = [f"  {'method':8}{'GiB':>8}{'of':>8}  {'':14}{'time':>9}{'tokens':>9}{'checkpointed':>15}"]
        for m in self.methods:
            layers = f"{m.checkpointed_layers} of {m.layers}"
            rows.append(
                f"{'*' if m.method == self.chosen else '':2}{m.method:8}{m.peak_gib:8.1f}{self.memory_gib:8.1f}  "
                f"{'fits' if m.fits else 'does not fit':14}{duration(m.minutes):>9}{m.tokens_per_batch:9}{layers:>15}"
            )
        return "\n".join([*rows, self.why, *self.changes])


def cards_table(plans: Sequence[Plan]) -> str:
    """Device x method, as text: GiB and time, or that it does not fit."""
    rows = [f"{'':10}{'GiB':>6}" + "".join(f"{method:>24}" for method in METHODS)]
    for plan in plans:
        cells = [
            f"{m.peak_gib:.1f} GiB, {duration(m.minutes) if m.fits else 'too much'}" for m in plan.methods
        ]
        rows.append(f"{plan.device:10}{plan.memory_gib:6.1f}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(rows)


def tokens_per_second(rows: Sequence[dict]) -> float:
    """Of a history's training rows but the first, which pays for warming up."""
    rows = [row for row in rows if "tokens" in row]
    rows = rows[1:] or rows
    return sum(row["tokens"] for row in rows) / sum(row["tokens"] / row["tokens_per_second"] for row in rows)


class _Planner:
    """One method on one device: peak and time of any split of a step, and the best split."""

    def __init__(
        self,
        config,
        settings: Settings,
        machine: Machine,
        card: Card | None,
        lengths: Lengths,
        dtype,
        method: str,
        cards: int,
    ):
        self.settings, self.machine, self.lengths, self.dtype, self.method = (
            settings,
            machine,
            lengths,
            dtype,
            method,
        )
        self.cuda, self.full = machine.device == "cuda", method == "full"
        key = config.to_json_string(), settings.lora_rank
        self.shape = (
            _shapes[key] if key in _shapes else _shapes.setdefault(key, _shape(config, settings.lora_rank))
        )
        self.trained = self.shape.total if self.full else self.shape.adapters
        self.weights = self._weights(getattr(config, "dtype", None) or torch.float32)
        self.cards, self.pairs = (
            cards,
            max(1, math.ceil(settings.pairs_per_step / cards)),
        )  # pairs of a step on one card
        # Eight random pairs are rarely half as long again as eight mean ones.
        step = self.pairs * min(lengths.longest, 1.5 * lengths.mean)
        self.most = max(lengths.longest, round(step), 16)
        self.profile = _profile(
            config, settings, method, dtype, machine, lengths, self.shape, self.most, cards > 1
        )
        self.rate, self.bandwidth, self.rate_source = _rates(machine, card, dtype)
        self.memory = machine.memory_gib * GIB * (APPLE_SHARE if machine.device == "mps" else 1)
        self.limit = self.memory * (1 - MARGIN) / GIB
        if machine.free_gib is not None:  # counted when this process had its context already
            self.limit = min(self.limit, machine.free_gib + CUDA_CONTEXT_GIB)
        self.framework = (
            CUDA_CONTEXT_GIB * GIB if self.cuda else psutil.Process().memory_info().rss + CPU_GROWTH_GIB * GIB
        )

    def _weights(self, stored: torch.dtype) -> float:
        """Bytes, of a model whose file has them as `stored`."""
        shape, size = self.shape, self.dtype.itemsize
        if self.full:
            return 4.0 * shape.total
        if self.method == "lora":
            # On a CPU what is not converted stays a view of the file, and rows that are never looked up stay on the disk.
            unread = shape.untied if self.machine.device == "cpu" and stored == self.dtype else 0
            return float(size * (shape.total - unread))
        # NF4: 4 bits, an 8-bit scale for each 64 weights, a float32 one for each 256 scales.
        return shape.bulk * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + size * (shape.total - shape.bulk)

    def optimizer(self, name: str = "") -> tuple[float, float, float]:
        """Bytes of its state on the device, of state that may leave it, and of what an update holds for a moment."""
        name, n = name or self.settings.optimizer, self.trained
        if name == "adafactor":
            return 4.0 * (self.shape.factored if self.full else n / 8), 0.0, 12.0 * min(self.shape.largest, n)
        kept = self.shape.embeddings if self.full else 0  # in 32 bit by 8-bit optimizers too
        state = 2.03 * (n - kept) + 8.0 * kept if "8bit" in name else 8.0 * n
        return (0.0, state, 0.0) if name.startswith("paged") and self.cuda else (state, 0.0, 0.0)

    def parts(self, tokens: int, checkpointed: int) -> dict[str, float]:
        """The peak by part, GiB."""
        tokens = min(
            max(tokens, self.lengths.longest), self.most
        )  # a longer pair is a micro-batch of its own
        # Gradients of the micro-batches before; adapters' are small; sharded ones leave the card layer by layer.
        held = not self.full or tokens < self.most or self.cards > 1
        gradients = 4.0 * self.trained / self.cards
        peak, head, made = self.profile.peak(tokens, self.shape.layers, checkpointed, held)
        if (
            self.machine.device != "cuda"
        ):  # the masks of the rejected answers, which only the CPU's kernel wants
            masks = self.lengths.rejected * (self.lengths.prompt + self.lengths.rejected) / self.lengths.mean
            peak += tokens * masks * self.dtype.itemsize
        activations = peak - head - made
        gradients_then = gradients if held else made
        state, _, passing = (size / self.cards for size in self.optimizer())
        if (
            gradients + passing > activations + head + gradients_then
        ):  # the optimizer's own moment, activations gone
            activations, head, gradients_then = passing, 0.0, gradients
        parts = {
            "weights": self.weights / self.cards, "adapters": 0.0 if self.full else gradients,
            "gradients": gradients_then, "optimizer": state, "activations": activations, "head": head,
            "framework": self.framework + FRAGMENTATION[self.machine.device] * (activations + head),
        }  # fmt: skip
        if (
            self.cards > 1
        ):  # fully sharded; embeddings and head are counted as gathered, of the layers the one at work and the next
            ends = self.shape.head + self.shape.untied
            layer = (self.shape.total - ends) / self.shape.layers
            parts["gathered"] = self.dtype.itemsize * (ends + 2 * layer)
            if self.full:  # and their gradients, until they are summed over the cards, in float32
                parts["gathered"] += self.dtype.itemsize * (ends + layer) + 4.0 * layer
        return {name: value / GIB for name, value in parts.items()}

    def peak(self, tokens: int, checkpointed: int) -> float:
        return sum(self.parts(tokens, checkpointed).values())

    def minutes(self, tokens: int, checkpointed: int) -> tuple[float, tuple[str, ...]]:
        """Of the run, and the arithmetic behind it."""
        settings, lengths, shape = self.settings, self.lengths, self.shape
        p, c, r, per_step = lengths.prompt, lengths.chosen, lengths.rejected, self.pairs
        again = checkpointed / shape.layers
        # First-fit leaves about a tenth of a budget empty where a step does not go in at once.
        batches = math.ceil(per_step * lengths.mean / tokens * (1.1 if tokens < self.most else 1))
        row = per_step * lengths.mean / batches
        # Operations for a pair. Layers: forward and gradients of activations, with full tuning of weights too.
        forward = 2.0 * lengths.mean * (shape.active + (0 if self.full else shape.adapters))
        seen = row * lengths.mean if shape.dense else (p + c) ** 2 / 2 + r * p + r * r / 2
        scores = 4.0 * seen * shape.attention_width * shape.layers
        scored = c + r + (p if settings.nll_over != "answer" else 0)
        passes = (3 if self.full else 2) + again
        head = (
            (8.0 if self.full else 4.0) * scored * shape.head
        )  # see head.py: recomputed, or kept as a Jacobian
        pair = forward * passes + scores * (3.5 + again) + head  # flash attention's backward is 2.5 forwards
        size = self.dtype.itemsize
        moved, launches = self.profile.work(row, shape.layers, checkpointed)
        if not self.cuda:  # all but the weights is in the share of the rate that is measured
            moved = {
                "full": (4 + size) * shape.total,
                "lora": size * shape.total,
                "qlora": (0.5 + 2 * size) * shape.bulk,
            }[self.method]
            moved, launches = moved * (2 + again), 0.0
        computing = per_step * pair / self.rate
        moving = (batches * moved + 28.0 * self.trained / self.cards) / self.bandwidth
        waiting = max(0.0, batches * launches * LAUNCH - computing - moving)
        paged = self.optimizer()[1] / self.cards
        over = (
            self.peak(tokens, checkpointed) * GIB + paged - self.memory
        )  # leaves the card and comes back, every step
        paging = 2 * min(max(over, 0.0), paged) / HOST_LINK
        step = computing + moving + waiting + paging
        steps = math.ceil(settings.epochs * lengths.pairs / settings.pairs_per_step)
        steps = max(1, min(steps, settings.max_steps or steps))
        evaluations = 2 + (steps // settings.eval_every_steps if settings.eval_every_steps else 0)
        evaluation = (
            evaluations
            * settings.eval_pairs
            * (forward + scores + head / 2)
            / pair
            * (step - paging)
            / per_step
        )
        total = (steps * step + evaluation) / 60
        lines = (
            f"{lengths.pairs:,} pairs ({lengths.source}); a pair: {lengths.mean:.0f} tokens, "
            f"{pair / 1e12:.3g} TFLOP (layers {forward * passes / 1e12:.3g} in {passes:.2f} passes, "
            f"attention {scores * (3.5 + again) / 1e12:.3g}, head {head / 1e12:.3g})",
            f"a step: {per_step} pairs in {batches} micro-batches, {step:.3g} s (computing {computing:.3g} at "
            f"{self.rate / 1e12:.3g} TFLOP/s, {self.rate_source}; moving bytes {moving:.3g} at {self.bandwidth / 1e9:.3g} GB/s; "
            f"waiting for launches {waiting:.3g}; paging optimizer state {paging:.3g})",
            f"the run: {steps} steps x {step:.3g} s + {evaluations} evaluations in {evaluation:.3g} s = {total:.3g} min, "
            "without the answers written for comparison and the checkpoints",
        )
        return total, lines

    def best(self) -> MethodPlan:
        """The quickest split that fits; of equally quick ones the one with the larger budget; else the smallest."""
        settings, layers, longest = self.settings, self.shape.layers, self.lengths.longest
        budgets, counts = [settings.tokens_per_batch], [settings.checkpointed_layers]
        if settings.tokens_per_batch == "auto":
            budgets = list(
                dict.fromkeys(round(self.most * (longest / self.most) ** (i / 12)) for i in range(13))
            )
        counts = range(layers + 1) if counts == ["auto"] else [min(*counts, layers)]
        fitting = []
        for budget in budgets:
            counts_that_fit = [count for count in counts if self.peak(budget, count) <= self.limit]
            # More recomputing than needed pays only where it keeps paged state on the card.
            fitting += [(budget, count) for count in counts_that_fit[: None if self.optimizer()[1] else 1]]
        times = {split: self.minutes(*split)[0] for split in fitting}
        quickest = 1.001 * min(times.values(), default=0.0)
        split = next((s for s in fitting if times[s] <= quickest), (budgets[-1], counts[-1]))
        parts, (minutes, lines) = self.parts(*split), self.minutes(*split)
        weights, state = 4.0 * self.trained, sum(self.optimizer()[:2])
        saved = weights + state
        said = (
            f"a checkpoint: {saved / GIB:.3g} GiB (weights {weights / GIB:.3g}, optimizer {state / GIB:.3g})"
        )
        lines += (f"{said}, {saved / DISK:.3g} s at {DISK / 1e9:g} GB/s of disk",)
        return MethodPlan(
            self.method,
            sum(parts.values()),
            parts,
            minutes,
            bool(fitting),
            *split,
            layers,
            saved / GIB,
            saved / DISK,
            lines,
        )


def make_plan(
    config,
    settings: Settings,
    target: Machine | Card | str,
    lengths: Lengths,
    *,
    dtype: torch.dtype | None = None,
    cards: int = 1,
) -> Plan:
    """Plan a run with every method.

    Args:
        config: of the model, from `model.load_config`.
        target: a machine, a card, or a name that `find_card` knows.
        lengths: `measured_lengths` of encoded pairs, or `preset_lengths` before there are any.
        dtype: of the computation; None takes what `pick_precision` gives.
        cards: how many such devices share the weights, their gradients and the optimizer's state (FSDP).

    Raises:
        UserError: unknown card; a model that transformers cannot build or that cannot be simulated.
    """
    target = find_card(target) if isinstance(target, str) else target
    card, machine = (target, target.machine) if isinstance(target, Card) else (None, target)
    dtype = dtype or pick_precision(settings.precision, machine)[0]
    check_apple(settings, machine)
    four_bit = (
        machine.device != "mps" and cards == 1
    ) or settings.method == "qlora"  # neither Apple GPUs nor FSDP have it
    tried = METHODS if four_bit else METHODS[:2]
    planners = {
        method: _Planner(config, settings, machine, card, lengths, dtype, method, cards) for method in tried
    }
    methods = {method: planner.best() for method, planner in planners.items()}
    chosen, why = _choose(settings, methods, machine)
    if planners[chosen].profile.stood_in:
        why += f"; this kind of model cannot be simulated, so activations are {planners[chosen].profile.stood_in}"
    if planners[chosen].limit < planners[chosen].memory * (1 - MARGIN) / GIB:
        why += f"; only {machine.free_gib:.1f} GiB of {machine.name} are free, another process holds the rest"
    changes = [] if methods[chosen].fits else _changes(settings, planners[chosen], methods)
    memory = planners[chosen].memory / GIB
    return Plan(
        machine.name,
        memory,
        list(methods.values()),
        chosen,
        why,
        changes,
        str(dtype).removeprefix("torch."),
        lengths,
    )


def plan_cards(config, settings: Settings, lengths: Lengths) -> list[Plan]:
    """A plan on each of CARDS; one without bfloat16 in hardware computes in what it has."""
    auto = replace(settings, precision="auto")
    has_it = [settings.precision != "bfloat16" or card.capability[0] >= 8 for card in CARDS.values()]
    return [
        make_plan(config, settings if has else auto, card, lengths)
        for card, has in zip(CARDS.values(), has_it, strict=True)
    ]


def _choose(settings: Settings, methods: dict[str, MethodPlan], machine: Machine) -> tuple[str, str]:
    """The strongest method that fits, and why; full tuning only at a learning rate that is meant for it."""
    if settings.method != "auto":
        return settings.method, f"{settings.method}: chosen in the settings"
    full, lora, qlora = methods["full"], methods["lora"], methods.get("qlora")
    if full.fits and settings.learning_rate <= FULL_LEARNING_RATE:
        return (
            "full",
            f"full: all weights can be trained in the memory of {machine.name}, and nothing is stronger",
        )
    reason = f"full needs {full.peak_gib:.1f} GiB"
    if full.fits:
        reason = f"full would fit too, but not with learning_rate {settings.learning_rate:g} (at most {FULL_LEARNING_RATE:g})"
    if lora.fits:
        return "lora", f"lora: the strongest method that fits; {reason}"
    if qlora is None:
        return "lora", f"lora: nothing fits, and this comes nearest; {reason}, lora {lora.peak_gib:.1f}"
    if qlora.fits:
        return "qlora", f"qlora: it takes 4-bit weights to fit; {reason}, lora {lora.peak_gib:.1f}"
    return (
        "qlora",
        f"qlora: nothing fits, and this comes nearest; {reason}, lora {lora.peak_gib:.1f}, qlora {qlora.peak_gib:.1f}",
    )


def _changes(settings: Settings, planner: _Planner, methods: dict[str, MethodPlan]) -> list[str]:
    """What would make the planner's method fit, nearest first."""
    found, layers, longest = [], planner.shape.layers, planner.lengths.longest
    plan, least = methods[planner.method], planner.peak(longest, layers)
    if least <= planner.limit:
        return ["set tokens_per_batch=auto and checkpointed_layers=auto"]
    fixed = least - planner.limit
    slope = (
        planner.profile.peak(2 * longest, layers, layers, True)[0]
        - planner.profile.peak(longest, layers, layers, True)[0]
    ) / GIB
    if 0.1 < (share := 1 - fixed / max(slope, 1e-9)):
        found.append(
            f"max_tokens={int(share * settings.max_tokens)} (pairs of up to {int(share * longest)} tokens) would fit"
        )
    lighter = next(
        (m for m in METHODS[METHODS.index(plan.method) + 1 :] if m in methods and methods[m].fits), None
    )
    if lighter:
        found.append(f"method={lighter} would fit ({methods[lighter].peak_gib:.1f} GiB)")
    saved = (planner.optimizer()[0] - planner.optimizer("adamw_8bit")[0]) / planner.cards / GIB
    if planner.full and settings.optimizer == "adamw" and least - saved <= planner.limit:
        found.append("optimizer=adamw_8bit would fit")
    larger = next(
        (
            c
            for c in sorted(CARDS.values(), key=lambda c: c.memory_gib)
            if least <= c.memory_gib * (1 - MARGIN)
        ),
        None,
    )
    if larger:
        found.append(f"one {larger.name} ({larger.memory_gib:g} GiB) would do")
    return found or ["choose a smaller base_model"]
