"""GPUs by their data sheets, found by the names people write, and the speed a step may count on.

It plans nothing. COPY_SHARE, a card's share and the links between cards are stated; no run has checked them.
"""

import functools
import re
from dataclasses import dataclass

import psutil
import torch

from ..errors import UserError
from ..machine import GIB, Machine, product_rate, quickest

PCIE, NETWORK, A_NODE = 12, 50, 8  # GB/s of a card; of a card to another machine; cards of a machine
COPY_SHARE = 0.85  # of a card's bandwidth, reached by operations that are no products
# Of the rate of a product that is timed here; off CUDA it covers all of a step.
MEASURED_SHARE = {"cuda": 0.9, "mps": 0.65, "cpu": 0.65}


@dataclass(frozen=True)
class Card(Machine):
    """A GPU. Memory as the driver reports it, GiB; dense TFLOP/s in 16 bit (summed in 32) and in 32; GB/s."""

    tflops_16: float = 0.0
    tflops_32: float = 0.0
    bandwidth: float = 0.0
    share: float = 0.7  # of the TFLOP/s, reached by large products
    link: float = PCIE  # GB/s sent to the cards beside it; over NVLink where it says so


_SHEETS = {  # memory, compute capability, TFLOP/s in 16 bit and in 32, bandwidth, share, link
    "T4": (14.7, (7, 5), 65, 8.1, 320, 0.37),  # throttles at 70 W
    "P100": (15.9, (6, 0), 18.7, 9.3, 732),  # no tensor cores
    "V100-16": (15.8, (7, 0), 112, 14, 900, 0.7, 150),
    "V100-32": (31.7, (7, 0), 112, 14, 900, 0.7, 150),
    "L4": (22.0, (8, 9), 121, 30.3, 300, 0.5),  # throttles at 72 W
    "A10": (22.0, (8, 6), 125, 31.2, 600),
    "RTX-3090": (23.7, (8, 6), 71, 35.6, 936),
    "RTX-4090": (23.6, (8, 9), 165.2, 82.6, 1008),
    "RTX-5090": (31.4, (12, 0), 209.5, 104.8, 1792),
    "A40": (44.4, (8, 6), 150, 37.4, 696),
    "L40S": (44.4, (8, 9), 362, 91.6, 864),
    "A6000": (47.5, (8, 6), 155, 38.7, 768),
    "A100-40": (39.4, (8, 0), 312, 19.5, 1555, 0.7, 300),
    "A100-80": (79.1, (8, 0), 312, 19.5, 2039, 0.7, 300),
    "H100": (79.1, (9, 0), 989, 67, 3350, 0.7, 450),
    "H100-PCIe": (79.1, (9, 0), 756, 51, 2000),
    "H100-NVL": (93.1, (9, 0), 835, 60, 3900, 0.7, 300),
    "H200": (139.8, (9, 0), 989, 67, 4800, 0.7, 450),
    "B200": (178.4, (10, 0), 2250, 75, 8000, 0.7, 900),
}
CARDS = {
    name: Card("cuda", name, memory, capability, None, *speeds)
    for name, (memory, capability, *speeds) in _SHEETS.items()
}


def link_rate(machine: Machine, cards: int) -> float:
    """Give the bytes a second that each of several cards sends to the others, by data sheets."""
    own = getattr(listed(machine.name), "link", PCIE)
    return 1e9 * (min(own, NETWORK) if cards > A_NODE else own)


def _words(name: str) -> tuple[set[str], list[float]]:
    """Split a card's name into the words that tell it from others, and the GiB that it names."""
    words = re.sub(r"nvidia|tesla|geforce|rtx|sxm\d?|hbm\d\w?|gb\b|[\s_-]+", " ", name.lower()).split()
    sizes = {word for word in words if word.isdigit() and len(word) < 4}
    return set(words) - sizes, list(map(float, sizes))


def listed(name: str, *sizes: float) -> Card | None:
    """Find the card of CARDS that people or its driver call so, its memory of `sizes` and as named."""
    (words, named), found = _words(name), {}
    for card in CARDS.values():
        own = _words(card.name)[0]
        of_this_memory = all(abs(size - card.memory_gib) <= 0.1 * size for size in (*sizes, *named))
        if own <= words <= own | {"pcie"} and of_this_memory:  # PCIe and SXM are alike in most cards
            found[card] = len(own)
    return max(found, key=found.get, default=None)


def find_card(name: Machine | str) -> Machine:
    """Find a card of CARDS by name, as people or its driver write it; or make a machine of `cpu` or `apple`,
    with GiB of RAM behind a dash or else this machine's. What is a machine already is given back."""
    if card := name if isinstance(name, Machine) else listed(name):
        return card
    if match := re.fullmatch(r"(cpu|apple)(?:[ -](\d+)(?: ?gb)?)?", name.strip().lower()):
        ram = float(match[2] or psutil.virtual_memory().total / GIB)
        return Machine("cpu", "CPU", ram) if match[1] == "cpu" else Machine("mps", "Apple GPU", ram)
    raise UserError(f"device is {name!r}, but must be one of {', '.join(CARDS)}, cpu-<GiB> or apple-<GiB>.")


@functools.cache
def copy_rate() -> float:
    """Time a copy of 256 MiB on a GPU; bytes read and written a second."""
    large = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    return 2 * large.numel() / quickest(lambda: large.clone()[0].item())


def rates(machine: Machine, dtype: torch.dtype) -> tuple[float, float, str]:
    """Give the operations and bytes a second that a step may count on, and where the first comes from."""
    here = torch.cuda.is_available()  # else nothing can be timed, and the name alone must do
    if card := listed(machine.name, *[machine.memory_gib] * here) if machine.device == "cuda" else None:
        peak = card.tflops_32 if dtype == torch.float32 else card.tflops_16
        said = f"{card.name}: {peak:g} TFLOP/s x {card.share:g}"
        return peak * 1e12 * card.share, card.bandwidth * 1e9 * COPY_SHARE, said
    if machine.device == "mps" and not torch.backends.mps.is_available():
        return 3e12 * 0.45, 100e9, "an Apple GPU, assumed: 3 TFLOP/s x 0.45"
    share, rate = MEASURED_SHARE[machine.device], product_rate(machine.device, dtype)
    copied = copy_rate() if machine.device == "cuda" else {"cpu": 10e9, "mps": 100e9}[machine.device]
    return rate * share, copied, f"timed here: {rate / 1e12:.3g} TFLOP/s x {share:g}"
