"""Will it fit, and how long will it take: answered from a model's config.json alone.

Every method is planned with the quickest split of a step that fits, and the strongest that fits is chosen.
It loads no weights, and does not know the time of writing answers and checkpoints.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from ..kinds import check_method, is_quantised, load_config, positions_of
from ..machine import GIB, Machine, check_apple, pick_precision, this_machine
from ..session import duration
from ..settings import Settings, settle, unusual
from .cards import CARDS, find_card
from .costs import MARGIN, Costs, MethodPlan
from .lengths import Lengths, lengths_of, measured_lengths  # noqa: F401, this room's door

METHODS = ("full", "lora", "qlora")  # strongest first
FULL_LEARNING_RATE = 1e-5  # above it full tuning is not taken unasked: it would destroy the model


@dataclass(frozen=True)
class Plan:
    """Every method on one device; which is chosen and why; where it does not fit, what would."""

    device: str
    memory_gib: float
    methods: list[MethodPlan]
    chosen: str
    why: str
    changes: list[str]
    dtype: str
    lengths: Lengths
    adapters: str  # which layers would have some, and which none
    price: float  # of an hour
    auto: dict[str, tuple]  # {setting: (what auto takes, for what or why)}
    notes: list[str]  # on values that are far from usual

    as_dict = asdict

    @property
    def method(self) -> MethodPlan:
        """Give the chosen one."""
        return next(m for m in self.methods if m.method == self.chosen)

    def line(self) -> str:
        """Say it in one line, for the panel."""
        m = self.method
        verdict = "fits" if m.fits else "; ".join(["does not fit", *self.changes[:1]])
        device = "CPU" if self.device.startswith("CPU") else self.device
        minutes = duration(m.minutes, self.price)
        return f"{m.peak_gib:.1f} of {self.memory_gib:.1f} GiB, about {minutes} on this {device}: {verdict}"

    def said(self) -> str:
        """Say it for the panel: in one line, then what auto takes, and what is unusual."""
        by = {}
        for name, (value, why) in self.auto.items():
            if name != "method":  # of which the table tells
                by.setdefault(why, []).append(f"{name} {value:g}")
        taken = "; ".join(f"{', '.join(names)} ({why})" for why, names in by.items())
        return "\n".join([self.line(), *[f"Auto: {taken}"] * bool(taken), *self.notes])

    def table(self) -> str:
        """Lay it out as text, a line for each method; the chosen one has a star."""
        rows = [f"  {'method':8}{'GiB':>8}{'of':>8}  {'':14}{'time':>16}{'tokens':>9}{'checkpointed':>15}"]
        for m in self.methods:
            star, fits = "*" if m.method == self.chosen else "", "fits" if m.fits else "does not fit"
            layers, minutes = f"{m.checkpointed_layers} of {m.layers}", duration(m.minutes, self.price)
            row = f"{star:2}{m.method:8}{m.peak_gib:8.1f}{self.memory_gib:8.1f}  {fits:14}{minutes:>16}"
            rows.append(f"{row}{m.tokens_per_batch:9}{layers:>15}")
        more = *self.said().splitlines()[1:], *[self.adapters] * (self.chosen != "full")
        return "\n".join([*rows, self.why, *self.changes, *more])


def cards_table(plans: Sequence[Plan]) -> str:
    """Lay out device x method as text: GiB and time, or that it does not fit."""
    rows = [["", "GiB", *METHODS]]
    for plan in plans:
        times = [duration(m.minutes) if m.fits else "too much" for m in plan.methods]
        cells = [f"{m.peak_gib:.1f} GiB, {time}" for m, time in zip(plan.methods, times, strict=True)]
        rows.append([plan.device, f"{plan.memory_gib:.1f}", *cells])
    return "\n".join(
        f"{name:10}{gib:>6}" + "".join(f"{cell:>24}" for cell in cells) for name, gib, *cells in rows
    )


def make_plan(
    config, settings: Settings, target: Machine | str, lengths: Lengths, *, dtype: torch.dtype | None = None,
    cards: int = 1, sharded: bool = True, begun: bool = False, brief: bool = False,
) -> Plan:  # fmt: skip
    """Plan a run with every method.

    Args:
        target: the device, or its name for `find_card`.
        dtype: of the computation; None takes what `pick_precision` gives.
        cards: how many such devices share the pairs of a step. sharded: also the weights, their gradients and
            the optimizer's state (FSDP2); else each has its own (DDP).
        begun: the run has checkpoints, so it keeps to its kind of optimizer state.
        brief: plan no method but the one that would be chosen, and those before it that do not fit.
    """
    machine = find_card(target)
    dtype = dtype or pick_precision(settings.precision, machine)[0]
    check_apple(settings, machine)
    check_method(config, settings.method, settings.base_model)
    given, (settings, _) = settings, settle(settings, pairs=lengths.pairs, positions=positions_of(config))
    many = (cards, sharded and cards > 1)
    costs, methods = _methods(config, settings, machine, lengths, dtype, many, begun, brief)
    chosen, why = _choose(settings, methods, machine, is_quantised(config))
    one = costs[chosen]
    known = dict(weights=one.shape.total, method=chosen, pairs=lengths.pairs)
    found, reasons = settle(given, **known)
    auto = {name: (getattr(found, name), of.removeprefix("auto: ")) for name, of in reasons.items()}
    return Plan(
        device=f"{cards} x {machine.name} ({'FSDP2' if sharded else 'DDP'})" if cards > 1 else machine.name,
        memory_gib=one.memory / GIB,
        methods=list(methods.values()),
        chosen=chosen,
        why=why + _reservations(one),
        changes=[] if methods[chosen].fits else _changes(one, methods),
        dtype=str(dtype).removeprefix("torch."),
        lengths=lengths,
        adapters=one.shape.about_adapters,
        price=settings.price_per_hour,
        auto=auto | ({"method": (chosen, why)} if given.method == "auto" else {}),
        notes=unusual(given, **known),
    )


def _methods(config, settings, machine, lengths, dtype, many, begun, brief) -> tuple[dict, dict]:
    """Plan with every method that there is for this model on such a machine: its costs, its best split."""
    # Weights that are saved in few bits are not trained in full; neither Apple GPUs nor FSDP have 4-bit ones.
    quantised, four_bit = is_quantised(config), (machine.device != "mps" and not many[1])
    names = METHODS[quantised : 3 if four_bit or settings.method == "qlora" else 2]
    asked = "lora" if quantised and settings.method == "auto" else settings.method
    if brief:
        first = METHODS[not _may_be_full(settings)] if asked == "auto" else asked
        names = names[names.index(first) :] if first in names else names
    # AdamW without pages where its state fits beside the rest: the same numbers sooner.
    paged = settings.optimizer == "paged_adamw_32bit" and not begun
    optimizers = [replace(settings, optimizer="adamw"), settings] if paged else [settings]
    costs, methods = {}, {}
    for method in names:
        for some in optimizers:
            costs[method] = one = Costs(config, some, machine, lengths, dtype, method, *many)
            if brief and method not in (asked, names[-1]) and one.weights / one.holders > one.limit * GIB:
                break
            methods[method] = one.best()
            if methods[method].fits:
                break
        if brief and method in methods and methods[method].fits:
            break
    return costs, methods


def _may_be_full(settings: Settings) -> bool:
    return settings.learning_rate != "auto" and settings.learning_rate <= FULL_LEARNING_RATE


def _choose(settings: Settings, methods: dict[str, MethodPlan], machine, quantised: bool) -> tuple[str, str]:
    """Choose the strongest method that fits, and say why; full tuning only at its learning rates."""
    if settings.method != "auto":
        return settings.method, f"{settings.method}: chosen in the settings"
    if quantised:
        return "lora", "lora: the weights of this base model are quantised as they come"
    words = {
        "full": f"all weights can be trained in the memory of {machine.name}, and nothing is stronger",
        "lora": "the strongest method that fits" + " of those planned" * ("full" not in methods),
        "qlora": "it takes 4-bit weights to fit",
    }
    why, stronger = "nothing fits, and this comes nearest", []
    for name, m in methods.items():
        if m.fits and (name != "full" or _may_be_full(settings)):
            why = words[name]
            break
        peak = f"{name} {m.peak_gib:.1f}" if stronger else f"{name} needs {m.peak_gib:.1f} GiB"
        limit = f"a learning_rate of at most {FULL_LEARNING_RATE:g}"
        stronger.append(f"full would fit too, but it takes method=full or {limit}" if m.fits else peak)
    return name, f"{name}: " + "; ".join([why, *[", ".join(stronger)] * bool(stronger)])


def plan_cards(config, settings: Settings, lengths: Lengths) -> list[Plan]:
    """Plan on each of CARDS; one without bfloat16 in hardware computes in what it has."""
    older = replace(settings, precision="auto") if settings.precision == "bfloat16" else settings
    ways = {card: settings if card.capability >= (8, 0) else older for card in CARDS.values()}
    return [make_plan(config, way, card, lengths) for card, way in ways.items()]


def estimate(settings: Settings, device: Machine | str = "", **how) -> Plan:
    """Plan a run from the model's config.json alone: on a card or the machine at hand; `how`: make_plan's."""
    machine = find_card(device or this_machine())
    config, settings = fitted(settings, machine)
    return make_plan(config, settings, machine, lengths_of(settings), **how)


def estimates(settings: Settings) -> list[Plan]:
    """Plan the same on every card that is known."""
    config, settings = fitted(settings, this_machine())
    return plan_cards(config, settings, lengths_of(settings))


def fitted(settings: Settings, machine: Machine) -> tuple:
    """Settle the base model, and how long a text it can read; its config and the settings."""
    settings, _ = settle(settings, gpu_gib=machine.gpu_gib)
    config = load_config(settings.base_model)
    return config, settle(settings, positions=positions_of(config))[0]


def settled(settings: Settings) -> Settings:
    """Settle every number that is auto, by a plan for the machine at hand."""
    if not settle(settings, gpu_gib=0, positions=(), weights=0, method="", pairs=0)[1]:
        return settings
    _, settings = fitted(settings, this_machine())
    return replace(settings, **{name: value for name, (value, _) in estimate(settings).auto.items()})


def _reservations(costs: Costs) -> str:
    """Say what else there is to know of the method chosen: a stand-in, too little memory, experts."""
    said, machine, size = "", costs.machine, costs.dtype.itemsize
    if costs.profile.stood_in:
        said += f"; this kind of model cannot be simulated, so activations are {costs.profile.stood_in}"
    if costs.limit < costs.memory * (1 - MARGIN) / GIB:
        free = f"only {machine.free_gib:.1f} GiB of {machine.name} are free"
        said += f"; {free}, another process holds the rest"
    if costs.method == "qlora" and costs.shape.experts:
        gib = size * costs.shape.experts / GIB
        said += f"; {gib:.1f} GiB of fused experts stay in {8 * size} bit, so it saves less"
    return said


def _changes(costs: Costs, methods: dict[str, MethodPlan]) -> list[str]:
    """List what would make this method fit, nearest first."""
    found, layers, longest, settings = [], costs.shape.layers, costs.lengths.longest, costs.settings
    least = costs.peak(longest, layers)
    if least <= costs.limit:
        return ["set tokens_per_batch=auto and checkpointed_layers=auto"]
    twice, once = (costs.profile.peak(n, layers, layers, True)[0] / GIB for n in (2 * longest, longest))
    share = 1 - (least - costs.limit) / max(twice - once, 1e-9)
    if share > 0.1:
        pairs = f"pairs of up to {int(share * longest)} tokens"
        found.append(f"max_tokens={int(share * settings.max_tokens)} ({pairs}) would fit")
    weaker = METHODS[METHODS.index(costs.method) + 1 :]
    if lighter := next((m for m in weaker if m in methods and methods[m].fits), None):
        found.append(f"method={lighter} would fit ({methods[lighter].peak_gib:.1f} GiB)")
    saved = (costs.optimizer()[0] - costs.optimizer("adamw_8bit")[0]) / costs.holders / GIB
    if costs.full and settings.optimizer == "adamw" and least - saved <= costs.limit:
        found.append("optimizer=adamw_8bit would fit")
    enough = [card for card in CARDS.values() if least <= card.memory_gib * (1 - MARGIN)]
    if larger := min(enough, key=lambda card: card.memory_gib, default=None):
        found.append(f"one {larger.name} ({larger.memory_gib:g} GiB) would do")
    return found or ["choose a smaller base_model"]
