"""What a 70B model needs on many GPUs, by the planner: the tables of docs/scale.md.

    python -m tests.benchmarks.scale

It measures nothing and downloads nothing.
"""

import math

from transformers import LlamaConfig

from lazyorpo_lib.plan import costs
from lazyorpo_lib.plan.lengths import preset_lengths
from lazyorpo_lib.plan.planner import CARDS, make_plan
from lazyorpo_lib.settings import Settings

LLAMA_70B = LlamaConfig(  # Llama 3 70B, as its config.json has it
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_theta=500000.0,
    tie_word_embeddings=False,
)
DATASET = "HuggingFaceH4/ultrafeedback_binarized"
SETTINGS = dict(pairs_per_step=128, max_prompt_tokens=1024, max_tokens=2048, learning_rate=5e-6, eval_pairs=0)
A_NODE = 8
LINK = {
    True: 450e9,
    False: 50e9,
}  # bytes a second of one card: NVLink within a node; 400 Gbit/s between nodes
PAIRS = 10_000, 100_000, 1_000_000


def row(method: str, name: str, cards: int) -> list[str]:
    """One line of the table: the plan of a card, and hours for each of PAIRS."""
    settings = Settings(method=method, **SETTINGS)
    lengths = preset_lengths(DATASET, settings)
    costs.link_rate = lambda machine, cards: math.inf  # links are told beside the computing
    plan = make_plan(LLAMA_70B, settings, name, lengths, cards=cards)
    best, parts = plan.method, plan.method.parts
    if not best.fits:
        return [
            method,
            f"{cards // A_NODE} x {A_NODE} {name}",
            f"{best.peak_gib:.0f} of {plan.memory_gib:.0f}",
            "does not fit",
        ]
    steps = math.ceil(lengths.pairs / settings.pairs_per_step)
    computing = 60 * best.minutes / steps
    # Of each micro-batch: weights gathered in 16 bit for the forward and again for the backward; what is
    # trained, summed in 32.
    on_a_card = math.ceil(settings.pairs_per_step / cards)
    batches = math.ceil(on_a_card * lengths.mean / best.tokens_per_batch)
    weights = parts["weights"] * cards * 2**30 / (2 if method == "full" else 1)
    trained = parts["optimizer"] * cards * 2**30 / 2  # AdamW holds two numbers for each
    links = batches * (2 * weights + trained) / LINK[cards <= A_NODE]
    hours = [f"{n / settings.pairs_per_step * max(computing, links) / 3600:,.1f}" for n in PAIRS]
    held = sum(parts[name] for name in ("weights", "adapters", "gradients", "optimizer"))
    return [
        method,
        f"{cards // A_NODE} x {A_NODE} {name}",
        f"{best.peak_gib:.0f} of {plan.memory_gib:.0f}",
        f"{held:.1f} + {parts['gathered']:.1f} + {parts['activations'] + parts['head']:.1f}",
        f"{best.checkpointed_layers} of {best.layers}",
        f"{on_a_card} in {batches} batches",
        f"{computing:.1f} / {links:.1f}",
        *hours,
    ]


def main() -> None:
    settings = Settings(**SETTINGS)
    lengths = preset_lengths(DATASET, settings)
    print(
        f"{settings.pairs_per_step} pairs a step, {lengths.mean:.0f} tokens a pair ({lengths.source}), "
        f"longest {lengths.longest}.\n"
    )
    print(
        "| method | nodes | GiB of a card | held + gathered + activations | checkpointed layers "
        "| pairs of a step on a card "
        f"| s a step: computing / links | h for {' | h for '.join(f'{n:,} pairs' for n in PAIRS)} |"
    )
    print("|---" * (7 + len(PAIRS)) + "|")
    for method in ("lora", "full"):
        for name, cards in (("H100", 8), ("H100", 16), ("H100", 32), ("H100", 64), ("H200", 8), ("H200", 16)):
            print("| " + " | ".join(row(method, name, cards)) + " |", flush=True)
    for name in ("A100-80", "H100", "H200"):
        card = CARDS[name]
        print(f"\n{name}: {card.tflops_16:g} TFLOP/s x {card.share:g}, {card.memory_gib:g} GiB", end="")
    print()


if __name__ == "__main__":
    main()
