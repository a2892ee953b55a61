"""Apple GPUs, as far as a machine without one can tell: what is chosen for them, and what is refused."""

import pytest
import torch
from transformers import LlamaConfig

from lazyorpo_lib import run
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.machine import Machine, pick_precision
from lazyorpo_lib.plan.planner import Lengths, make_plan
from lazyorpo_lib.settings import Settings

APPLE = Machine("mps", "Apple GPU", 16.0)


def test_precision_is_float32_unless_float16_is_asked_for():
    assert pick_precision("auto", APPLE)[0] == torch.float32
    assert pick_precision("float16", APPLE)[0] == torch.float16


@pytest.mark.parametrize(
    "changes", [{"method": "qlora"}, {"optimizer": "adamw_8bit"}, {"optimizer": "paged_adamw_32bit"}]
)
def test_what_needs_bitsandbytes_is_refused_before_anything_is_fetched_or_written(
    changes, tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "this_machine", lambda: APPLE)
    settings = Settings(base_model="owner/never-fetched", output_dir=str(tmp_path / "run"), **changes)
    (value,) = changes.values()
    with pytest.raises(UserError, match=f"is {value}, .* Apple GPUs; choose"):
        run.Run(settings, {}).open()
    with pytest.raises(UserError, match="Apple GPUs"):
        make_plan(LlamaConfig(), settings, "apple-16", Lengths(10, 8, 8, 8, 24))
    assert not (tmp_path / "run").exists()


def test_a_plan_never_takes_four_bit_weights():
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    for gib in (16.0, 0.001):
        plan = make_plan(config, Settings(), Machine("mps", "Apple GPU", gib), Lengths(10, 8, 8, 8, 24))
        assert plan.chosen == "lora" and [m.method for m in plan.methods] == ["full", "lora"]
