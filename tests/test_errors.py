"""The hub is refused, slow, cut off or away: what is cached works, and the rest is said in one sentence with
the way out."""

import json
import os
import select
import shutil
import subprocess
import sys
import time

import pytest

from lazyorpo_lib.rows.dataset import DEMO
from tests.conftest import PLANTED, booby_trap
from tests.hub import serve

pytestmark = pytest.mark.slow


class Downloads:
    """A process that fetches from the hub at `url` into the cache `home`; `errors` is the file of what it
    writes to stderr."""

    def __init__(self, url, home, **environment):
        self.errors = open(home.with_name(home.name + ".err"), "a+")
        settings = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_TOKEN": PLANTED,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        settings |= {
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, text=True,
            env=os.environ | settings | environment,
        )  # fmt: skip

    def __call__(self, what, name):
        self.process.stdin.write(json.dumps([what, name]) + "\n")
        self.process.stdin.flush()
        began = time.monotonic()
        assert select.select([self.process.stdout], [], [], 120)[0], f"{name} hangs"
        (said,) = json.loads(self.process.stdout.readline())
        assert time.monotonic() - began < 90
        assert "Traceback" not in said and "\n" not in said and PLANTED not in said, said
        return said

    def close(self):
        self.process.communicate()
        self.errors.seek(0)
        assert PLANTED not in self.errors.read()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """What the hub has: a model and a dataset, and a model whose weights are a pickle, or that brings
    code."""
    from lazyorpo_lib.demo.model import write_tiny

    home = tmp_path_factory.mktemp("hub")
    write_tiny(home / "models" / "tiny")
    pickled = shutil.copytree(home / "models" / "tiny", home / "models" / "pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(booby_trap(home / "sprung"))
    coded = shutil.copytree(home / "models" / "tiny", home / "models" / "coded")
    config = json.loads((coded / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (coded / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto}))
    (coded / "evil.py").write_text(f"open({str(home / 'sprung')!r}, 'w')\n")
    pairs = home / "datasets" / "pairs"
    pairs.mkdir(parents=True)
    (pairs / "README.md").write_text("Pairs.\n")
    (pairs / "train.jsonl").write_text("".join(DEMO.read_text().splitlines(keepends=True)[:40]))
    scripted = home / "datasets" / "scripted"
    scripted.mkdir()
    (scripted / "README.md").write_text("Pairs.\n")
    (scripted / "scripted.py").write_text(f"open({str(home / 'sprung')!r}, 'w')\n")
    return home


@pytest.fixture(scope="module")
def hub(shelf):
    with serve(shelf) as server:
        yield server


@pytest.fixture(scope="module")
def fetch(hub, tmp_path_factory):
    downloads = Downloads(hub.url, tmp_path_factory.mktemp("cache"))
    yield downloads
    downloads.close()


SAID = {
    "private": "not on the hub: check the name, set HF_TOKEN",
    "gated": "ask for access at https://huggingface.co/{page} and set HF_TOKEN",
    "refused": "ask for access at https://huggingface.co/{page} and set HF_TOKEN",
    "missing": "not on the hub: check the name",
    "busy": "too many requests): wait",
    "broken": "the hub cannot be reached: check the network",
    "slow": "the hub cannot be reached: check the network",
    "cut": "the hub cannot be reached: check the network",
}


@pytest.mark.parametrize("what", ["model", "dataset"])
@pytest.mark.parametrize("owner", SAID)
def test_a_hub_that_fails_is_one_sentence_with_the_way_out(fetch, what, owner):
    name = f"{owner}/{'tiny' if what == 'model' else 'pairs'}"
    page = name if what == "model" else f"datasets/{name}"
    said = fetch(what, name)
    assert SAID[owner].format(page=page) in said and repr(name) in said and said.endswith(".")


@pytest.mark.parametrize(
    "what,name,sentence",
    [
        ("model", "fine/pickled", "no weights in safetensors"),
        ("model", "fine/coded", "which this kit never runs"),
        ("dataset", "fine/scripted", "no code of a dataset is ever run"),
        ("model", "fine/none", "not on the hub"),
    ],
)  # fmt: skip
def test_pickles_and_code_on_the_hub_are_refused_and_never_run(fetch, shelf, what, name, sentence):
    assert sentence in fetch(what, name)
    assert not (shelf / "sprung").exists()


def test_what_is_cached_works_while_the_hub_is_away_and_the_rest_is_one_sentence(shelf, tmp_path):
    with serve(shelf) as server:
        online = Downloads(server.url, tmp_path / "cache")
        assert online("model", "fine/tiny") == "" == online("dataset", "fine/pairs")
    offline = Downloads(server.url, tmp_path / "cache", HF_HUB_OFFLINE="1")
    for fetch in (offline, online):
        for what, name in (("model", "tiny"), ("dataset", "pairs")):
            assert fetch(what, f"fine/{name}") == ""
            assert "the hub cannot be reached: check the network" in fetch(what, f"other/{name}")
        fetch.close()
