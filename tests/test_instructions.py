"""instructions.py: every checker knows an answer that obeys from one that does not."""

import pytest

from lazyorpo_lib.instructions import INSTRUCTIONS, followed

OBEYS = [
    "Dark and quiet.", "PARIS", "dogs like to run.", "The sea is wide!", "Do horses sleep?", "Yes.", "8", "1, 2, 3, 4, 5",
    "Moon moon moon moon.", "A small soft animal.", "Because we tire.", "In winter snow lies on the river.", '"You are kind."',
    "- apple\n- pear\n- plum", '["red", "blue", "green"]', '{"name": "Ann", "age": 4}',
]  # fmt: skip
DOES_NOT = [
    "It is dark and quiet.", "Paris", "Dogs like to run.", "The sea is wide.", "Here is one:\nDo horses sleep?", "Yes, it is.", "Eight",
    "1, 2, 3, 4, 5, 6", "Moon moon moon.", "A cat is a small soft animal that likes to sleep all day.", "We tire.",
    "In winter the river is still.", "You are kind.", "1. apple\n2. pear\n3. plum", '["red", "blue"]', '["name", "age"]',
]  # fmt: skip


@pytest.mark.parametrize(("k", "prompt"), enumerate(INSTRUCTIONS))
def test_a_checker_tells_an_answer_that_obeys_from_one_that_does_not(k, prompt):
    check = INSTRUCTIONS[prompt]
    assert check(OBEYS[k]), OBEYS[k]
    assert not check(DOES_NOT[k]), DOES_NOT[k]


def test_an_empty_answer_follows_nothing_and_one_cut_short_never_does():
    assert followed(OBEYS) == [True] * len(INSTRUCTIONS)
    assert not any(followed([""] * len(INSTRUCTIONS)) + followed([text + "…" for text in OBEYS]))
