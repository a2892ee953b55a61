"""Trains the tests' little model for three steps and writes its adapters; started on one or on two processes by test_scale.py."""

import sys
from pathlib import Path

import torch

from tests.conftest import random_pairs
from tests.test_trainer import make, weights

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    trainer = make(folder / "run", random_pairs(30), max_steps=3, tokens_per_batch=90, learning_rate=1e-3, save_every_steps=2)
    trainer.train(resume_from_checkpoint=sys.argv[2] if len(sys.argv) > 2 else None)
    if trainer.is_world_process_zero():
        torch.save(weights(trainer), folder / "weights.pt")
