"""The fused LoRA layer: PEFT's values and gradients, in every precision, with dropout, and out of the way
when it must be."""

import pytest
import torch
from torch import nn

from lazyorpo_lib.fast.lora import replace_forwards
from lazyorpo_lib.model import add_adapters, import_peft
from lazyorpo_lib.settings import Settings
from tests.architectures import tiny_model


def adapted(layer, *, dropout=0.0, fused=True):
    """A model of one linear layer with adapters whose B is not zero."""
    peft = import_peft()
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0"], lora_dropout=dropout)
    model = peft.get_peft_model(nn.Sequential(layer), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    if fused:
        replace_forwards(model)
    return model


def outcome(model, x, autocast=None):
    """Output and gradients of x, A and B."""
    x = x.clone().requires_grad_()
    torch.manual_seed(2)  # dropout's
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = model(x)
    out.float().square().sum().backward()
    return [out.detach().float(), x.grad, *(p.grad for n, p in model.named_parameters() if "lora_" in n)]


def linear(bias=True):
    torch.manual_seed(0)
    return nn.Linear(24, 16, bias=bias)


@pytest.mark.parametrize("autocast, bound", [(None, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_peft(bias, dropout, autocast, bound):
    x = torch.randn(2, 5, 24)
    results = [
        outcome(adapted(linear(bias), dropout=dropout, fused=fused), x, autocast) for fused in (True, False)
    ]
    assert len(results[0]) == 4
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= bound * theirs.norm()


@pytest.mark.parametrize("autocast, bound", [(None, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_four_bit_layer_gives_what_peft_gives(autocast, bound):
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def four_bit():
        torch.manual_seed(0)
        dtype = autocast or torch.float32
        layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.support_avx512bf16_for_cpu = False
        return layer.to("cpu")

    x = torch.randn(2, 5, 128)
    results = [outcome(adapted(four_bit(), fused=fused), x, autocast) for fused in (True, False)]
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= bound * theirs.norm()


def test_the_adapter_switched_off_is_the_base_layer():
    x, layer = torch.randn(3, 24), linear()
    expected = layer(x)
    model = adapted(layer)
    assert not torch.allclose(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


def test_every_linear_layer_of_a_model_is_fused():
    model = add_adapters(tiny_model("llama"), Settings(lora_rank=4))
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert layers and all("forward" in vars(layer) for layer in layers)


def test_layers_stored_in_other_ways_are_left_to_peft():
    class EightBit(nn.Linear):
        """Its weight needs scales that only its own forward knows."""

    layer = EightBit(24, 16)
    model = adapted(layer)
    assert not any("forward" in vars(module) for module in model.modules() if hasattr(module, "lora_A"))
