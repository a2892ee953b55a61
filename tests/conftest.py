"""What the tests share: no hub, no trackers, quiet tokenizers, random pairs, what was simulated."""

import functools
import gc
import os
import pickle
import random
import re
import sys
from pathlib import Path

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
for name in [n for n in os.environ if n.startswith("LAZYORPO_")]:
    del os.environ[name]


# Files whose tests look at the same runs, plans, wheel or hub, which each process would make anew.
SHARED = "browser|errors|merging|package|planner|power|recipes|run|scale|share|stages"
SHARED = re.compile(rf".*/test_({SHARED})\.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give the tests of such a file to one process, those files first, and any other test by itself."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return found[0] if (found := SHARED.match(nodeid)) else nodeid

    return ByFile(config, log)


def pytest_collection_finish(session):
    """Freeze what the imports made: a run looks for garbage a few times, 0.4 s each if it looks there too."""
    if costs := sys.modules.get("lazyorpo_lib.plan.costs"):
        costs.simulate = simulated_once(costs.simulate)
    gc.collect()
    gc.freeze()


def simulated_once(simulate):
    """Have a model simulated once on a CPU, whatever the pairs' lengths: a run on other pairs would take 5 s
    for it, and figures are lines in tokens anyway. The planner's own tests take what this one wraps.
    """
    known = {}

    @functools.wraps(simulate)
    def once(config, settings, method, dtype, machine, rows, sharded=False):
        key = config.to_json_string(), method, dtype, settings.lora_rank, settings.lora_dropout > 0
        key += settings.nll_over, machine.device, sharded
        if machine.device != "cpu" or key not in known:
            known[key] = simulate(config, settings, method, dtype, machine, rows, sharded)
        return known[key]

    return once


@pytest.fixture
def pairs():
    """24 encoded pairs of random lengths over a vocabulary of 128; every answer ends with token 2."""
    return random_pairs(24)


def bitsandbytes_on_the_cpu():
    """bitsandbytes; a skip where it is not there, or so old that its optimizers want a GPU."""
    module, weight = pytest.importorskip("bitsandbytes"), torch.nn.Parameter(torch.ones(8))
    weight.grad = torch.ones(8)
    try:
        module.optim.AdamW8bit([weight]).step()
    except (AttributeError, RuntimeError, ValueError) as error:
        pytest.skip(f"this bitsandbytes has no optimizers for the CPU ({error})")
    return module


PLANTED = "hf_PLANTEDsecret0123456789"


def files_holding(folder, text: str) -> list[Path]:
    return [file for file in Path(folder).rglob("*") if file.is_file() and text.encode() in file.read_bytes()]


def booby_trap(proof) -> bytes:
    """A pickle that makes the file `proof` when it is loaded without care."""

    class Trap:
        def __reduce__(self):
            return Path.touch, (Path(proof),)

    return pickle.dumps(Trap(), protocol=2)  # as torch.save writes


def random_pairs(count: int, seed: int = 0, vocabulary: int = 128, longest: int = 24):
    from lazyorpo_lib.orpo.batching import EncodedPair

    rng = random.Random(seed)

    def tokens(low):
        return [rng.randrange(5, vocabulary) for _ in range(rng.randrange(low, longest))]

    return [EncodedPair(i, tokens(2), [*tokens(1), 2], [*tokens(1), 2]) for i in range(count)]
