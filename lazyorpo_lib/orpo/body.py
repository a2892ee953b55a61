"""The part of a model that a text goes through: body, layers, sizes.

Towers for pictures and sounds may stand beside it, which no pair reaches. It computes nothing.
"""

import re

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

_TOWER = re.compile(r"vision|visual|image|audio|speech|video", re.I)


def causal_lm(model):
    """Give the transformers model inside whatever wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body_of(model) -> nn.Module:
    """Give the module whose output the output layer of a causal LM reads."""
    body = model.get_decoder()
    if body is model.get_output_embeddings():  # ModernBERT's decoder calls its output layer so
        body = model.base_model
    return model.model if body is model else body  # Llama 4 names itself


def towers_of(model) -> list[str]:
    """Name the outermost modules that no text reaches: those for pictures and sounds, and whatever the models
    between a causal LM and its body hold besides the body."""
    body, found = body_of(model), []
    path = next(name for name, part in model.named_modules() if part is body)
    for name, _ in model.named_modules():
        parent, _, own = name.rpartition(".")
        beside = parent and path.startswith(f"{parent}.")
        if (beside or _TOWER.search(own)) and not is_within(path, [name]) and not is_within(name, found):
            found.append(name)
    return found


def is_within(name: str, places: list[str]) -> bool:
    """Tell whether a module or weight of this name lies in one of the modules named."""
    return f"{name}.".startswith(tuple(f"{place}." for place in places))


def text_layers(model) -> list[nn.Module]:
    """List the layers of the body whose activations can be recomputed; none where the class forbids it."""
    lm = causal_lm(model)
    if not lm.supports_gradient_checkpointing:
        return []
    beside = {part for name in towers_of(lm) for part in lm.get_submodule(name).modules()}
    inside = body_of(lm).modules()
    return [m for m in inside if isinstance(m, GradientCheckpointingLayer) and m not in beside]


def checkpoint_layers(model, count: int) -> int:
    """Recompute the activations of `count` text layers, or of all, in the backward; give of how many."""
    layers = text_layers(model)
    if count and layers:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    chosen = {*layers[:count]}
    for layer in (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)):
        layer.gradient_checkpointing = layer in chosen
    return len(chosen)


def fused_experts(model) -> list[nn.Parameter]:
    """List the weights that hold the experts of a layer in one, which are no layers of their own."""
    inside = (m for m in model.modules() if not isinstance(m, nn.Conv1d))
    return [p for m in inside for p in m.parameters(recurse=False) if p.dim() == 3]


def sizes_of(config, *names: str, least: int = 1) -> list[int]:
    """List the numbers that a text's config has under these names, in every layer where they differ."""
    text, found = config.get_text_config(decoder=True), []
    for name in names:
        try:
            value = getattr(text, name, None)
        except Exception:  # of transformers' own kind: it is each layer's own
            value = [getattr(layer, name, None) for layer in text.per_layer_config]
        values = value if isinstance(value, list | tuple) else [value]
        found += [x for x in values if isinstance(x, int) and not isinstance(x, bool) and x >= least]
    return found
