"""merging.py: shards hold what the whole model would; without room nothing is written."""

import json
import shutil
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from lazyorpo_lib import marker, model
from lazyorpo_lib.demo.model import TINY_MODEL
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.kinds import locate
from lazyorpo_lib.results import merging, share
from tests.results.test_share import make_run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny model in two files with an index, as large models come."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(locate(TINY_MODEL), folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for number, some in enumerate((names[:7], names[7:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name].bfloat16() for name in some}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "a", base)


def weights_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def without_room(monkeypatch, room=120_000):
    monkeypatch.setattr(merging, "free_bytes", lambda device: room)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shards_are_the_whole_model_and_load_as_it_does(run, base, tmp_path, monkeypatch, dtype):
    whole = share.merge(run, tmp_path / "whole", dtype=dtype)
    shard = max(file.stat().st_size for file in base.glob("*.safetensors"))
    without_room(monkeypatch, 1.2 * shard * dtype.itemsize / 2)
    monkeypatch.setattr(merging, "load_finished", None)
    out = share.merge(run, tmp_path / "out", dtype=dtype)
    files = {file.name: file.stat().st_size for file in out.glob("*.safetensors")}
    assert len(files) == 2 and max(files.values()) < 1.1 * shard * dtype.itemsize / 2
    one, other = weights_of(whole), weights_of(out)
    assert one.keys() == other.keys() and {value.dtype for value in other.values()} == {dtype}
    for name, value in one.items():
        assert torch.allclose(value.float(), other[name].float(), atol=1e-6, rtol=2**-7), name
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        told = [model.load_base(str(f), dtype=dtype, device="cpu")(ids).logits.float() for f in (whole, out)]
    assert (told[0] - told[1]).abs().max() < (1e-5 if dtype == torch.float32 else 0.1)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (whole, out)]
    assert configs[0] == configs[1]
    names = [sorted(f.name for f in folder.iterdir() if "model" not in f.name) for folder in (whole, out)]
    assert names[0] == names[1] and not marker.damaged(out)


def test_a_fully_tuned_model_is_whole_or_refused(base, tmp_path, monkeypatch):
    full = make_run(tmp_path / "full", base, adapter=False)
    without_room(monkeypatch)
    with pytest.raises(UserError, match="Merging takes .* of memory"):
        share.merge(full, dtype=torch.bfloat16)
    without_room(monkeypatch, 2**30)
    assert weights_of(share.merge(full, dtype=torch.bfloat16)).keys() == weights_of(full / "model").keys()


ODD = {
    "DoRA": {"use_dora": True},
    "another scale": {"use_rslora": True},
    "ranks of their own": {"rank_pattern": {"q_proj": 4}},
    "a setting of a later peft": {"unheard_of": 3},
    "other layers' weights": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("odd", ODD)
def test_an_adapter_that_is_not_plain_is_refused_before_anything_is_written(run, tmp_path, monkeypatch, odd):
    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "model" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | ODD[odd]))
    without_room(monkeypatch)
    before = sorted(copy.rglob("*"))
    with pytest.raises(
        UserError, match=r"Merging takes .* of memory, and 0 MiB are free: merge on a machine"
    ):
        share.merge(copy)
    assert sorted(copy.rglob("*")) == before


def test_a_file_of_the_base_that_memory_has_no_room_for_is_refused(run, monkeypatch):
    without_room(monkeypatch, 1000)
    with pytest.raises(UserError, match="Merging takes .* of memory"):
        share.merge(run)
    assert not (run / "merged").exists()


def test_a_layer_that_the_files_call_otherwise_is_refused(run, base, tmp_path, monkeypatch):
    other, copy = shutil.copytree(base, tmp_path / "other"), shutil.copytree(run, tmp_path / "copy")
    for file in other.glob("*.safetensors"):
        renamed = {f"net.{name}": value for name, value in load_file(file).items()}
        save_file(renamed, file, metadata={"format": "pt"})
    file = copy / "model" / "adapter_config.json"
    given = json.loads(file.read_text()) | {"base_model_name_or_path": str(other)}
    file.write_text(json.dumps(given))
    without_room(monkeypatch)
    with pytest.raises(UserError, match="Merging takes"):
        share.merge(copy)


@pytest.mark.parametrize("memory", [0, 2**40])
def test_no_room_on_the_disk_is_told_before_anything_is_written(run, tmp_path, monkeypatch, memory):
    without_room(monkeypatch, memory)
    usage = types.SimpleNamespace(free=1000, total=2**40)
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(
        UserError, match=r"The merged model takes .*, and 0 MiB are free at .*: make room there"
    ):
        share.merge(run, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_a_weight_that_is_too_large_for_the_format_is_told(base, tmp_path, monkeypatch):
    loud = make_run(tmp_path / "loud", base)
    file = loud / "model" / "adapter_model.safetensors"
    save_file({name: 1e4 * value for name, value in load_file(file).items()}, file)
    marker.seal(loud / "model", "model")
    without_room(monkeypatch)
    with pytest.raises(UserError, match="not finite"):
        share.merge(loud, dtype=torch.float16)
    assert not (loud / "merged").exists()


@pytest.mark.parametrize("fault", ["gone", "torn"])
def test_a_base_that_is_not_whole_is_one_sentence(run, base, tmp_path, monkeypatch, fault):
    other, copy = shutil.copytree(base, tmp_path / "other"), shutil.copytree(run, tmp_path / "copy")
    file = copy / "model" / "adapter_config.json"
    given = json.loads(file.read_text()) | {"base_model_name_or_path": str(other)}
    file.write_text(json.dumps(given))
    weights = min(other.glob("*.safetensors"))
    weights.unlink() if fault == "gone" else weights.write_bytes(b"torn")
    for room in (0, 2**40):
        without_room(monkeypatch, room)
        with pytest.raises(UserError) as error:
            share.merge(copy)
        assert "\n" not in str(error.value) and not (copy / "merged").exists()
