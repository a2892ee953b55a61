"""What each phase of a step holds, moves and launches: known at a few lengths of a cut model, told of any.

Every phase is linear in tokens, in stored layers and in checkpointed ones. It simulates nothing
(simulation.py does) and knows neither weights nor optimizer state (costs.py does).
"""

import math
import operator
from dataclasses import dataclass
from typing import NamedTuple

# Layers of the cut: two checkpointed, then one that is not: enough to tell what one more of either kind adds.
LAYERS = 3
PHASES = {"start", "head"} | {f"{way} {i}" for way in ("forward", "backward") for i in range(LAYERS)}


class Phase(NamedTuple):
    """Bytes at a phase's start, at its peak, and there without gradients; bytes moved by no product."""

    start: float
    peak: float
    bare: float
    moved: float
    launches: float


@dataclass(frozen=True)
class Profile:
    """The phases of a micro-batch of the cut: start, forward 0 to 2, head, backward 2 to 0."""

    points: tuple[tuple[int, dict[str, Phase]], ...]  # by tokens
    layer_gradient: float  # bytes
    dense: bool = False  # its attention scores are of every token with every other: quadratic
    stood_in: str = ""  # what the figures are of, where they are not of this model

    def at(self, tokens: int) -> dict[str, Phase]:
        """Read the phases at a length: on lines through the points, on parabolas where it is dense."""
        last = next((k for k, (count, _) in enumerate(self.points) if tokens <= count), len(self.points) - 1)
        degree = 2 if self.dense else 1
        near = self.points[max(0, last - degree) : max(last, degree) + 1]
        shares = [math.prod((tokens - b) / (a - b) for b, _ in near if b != a) for a, _ in near]

        def between(*phases: Phase) -> Phase:
            return Phase(*(sum(map(operator.mul, shares, column)) for column in zip(*phases, strict=True)))

        return {name: between(*(phases[name] for _, phases in near)) for name in near[0][1]}

    def work(self, tokens: int, layers: int, checkpointed: int) -> tuple[float, float]:
        """Count bytes moved besides products, and launches, of a micro-batch, forward and backward."""
        times = {"1": checkpointed - 1, "2": layers - checkpointed}  # 0 is of the checkpointed too
        phases = [(times.get(name.split()[-1], 1), phase) for name, phase in self.at(tokens).items()]
        return sum(n * x.moved for n, x in phases), sum(n * x.launches for n, x in phases)

    def peak(self, tokens: int, layers: int, checkpointed: int, held: bool) -> tuple[float, float, float]:
        """Find the highest point of a micro-batch: bytes without weights, the head's share, the gradients'.
        Where those are `held`, of earlier micro-batches, the backward makes none."""
        at, made = self.at(tokens), 0.0 if held else self.layer_gradient
        again, stored = checkpointed - (LAYERS - 1), layers - checkpointed - 1  # layers more than in the cut

        def grown(first: str, then: str) -> float:
            return at[then].start - at[first].start

        # What they keep: more while the forward runs, in which autocast holds its casts of the weights.
        forward = again * grown("forward 0", "forward 1") + stored * grown("forward 2", "head")
        backward = again * (grown("backward 0", "backward 1") + self.layer_gradient)
        kept = stored * (grown("backward 1", "backward 2") + self.layer_gradient)
        # The moments that may be highest, and what more layers add there: the backward gives up what a layer
        # stored, and makes its gradient.
        moments = [("head", forward), ("backward 0", made * (layers - LAYERS))]
        if stored >= 0:  # the first stored layer of the backward, or the last
            moments += [("forward 2", forward), ("backward 2", backward + max(kept, made * stored))]
        if checkpointed:
            moments.append(("backward 1", backward + made * stored))
        peaks = {name: phase.bare if held else phase.peak for name, phase in at.items()}
        height, top = max((peaks[name] + added, name) for name, added in moments)
        head = max(0.0, peaks[top] - at[top].start) if top == "head" else 0.0
        gradients = 0.0 if held else at[top].peak - at[top].bare
        return height, head, gradients + (made * (layers - LAYERS) if top == "backward 0" else 0.0)


def rough_profile(counts: list[int], hidden: int, inner: int, size: int, head: int) -> Profile:
    """Estimate: a layer stores about 12 hidden and 5 inner states, a checkpointed one its input; `size` is a
    number's bytes, `head` those that the head passes through."""
    table = {  # layers' inputs that are kept, layers of which all is kept, layers that pass
        "start": (1, 0, 0), "forward 0": (1, 0, 1), "forward 1": (2, 0, 1), "forward 2": (3, 0, 0),
        "head": (3, 1, 0), "backward 2": (3, 1, 1), "backward 1": (3, 0, 2), "backward 0": (2, 0, 2),
    }  # fmt: skip
    points = []
    for tokens in counts:
        state, phases = tokens * size * hidden, {}
        layer = 12 * state + 5 * tokens * size * inner
        for name, (inputs, stored, passing) in table.items():
            start = inputs * state + stored * layer
            peak = start + passing * layer + head * (name == "head")
            phases[name] = Phase(start, peak, peak, 3 * layer, 100)
        points.append((tokens, phases))
    return Profile(tuple(points), 0.0, stood_in="a rough estimate")
