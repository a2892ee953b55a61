"""The bar for an accuracy: what words alone tell of two answers, and that it knows no more than they do."""

import random
import time

import pytest

from lazyorpo_lib.orpo.data import clean, split_held_out
from lazyorpo_lib.results import words
from lazyorpo_lib.results.words import BagOfWords, said
from lazyorpo_lib.rows.candidates import candidates
from lazyorpo_lib.rows.dataset import open_rows

VOCABULARY = [f"word{n}" for n in range(400)]


def bag(pairs):
    made = BagOfWords()
    for chosen, rejected in pairs:
        made.add(chosen, rejected)
    return made


def talk(rng, *extra):
    said = [rng.choice(VOCABULARY) for _ in range(20)]
    for word in extra:
        said.insert(rng.randrange(len(said)), word)
    return " ".join(said)


def test_a_habit_of_style_is_found_and_chance_is_not():
    rng = random.Random(0)
    habit = bag((talk(rng, "sorry"), talk(rng)) for _ in range(400))
    chance = bag((talk(rng), talk(rng)) for _ in range(400))
    assert habit.accuracy(range(300), range(300, 400)) > 0.95
    assert 0.3 < chance.accuracy(range(300), range(300, 400)) < 0.7


@pytest.mark.parametrize("seed", range(6))
def test_answers_of_few_words_are_ranked_by_the_side_they_are_mostly_on(seed):
    rng = random.Random(seed)
    pairs = [("Yes", "No") if rng.random() < 0.65 else ("No", "Yes") for _ in range(400)]
    yes = sum(chosen == "Yes" for chosen, _ in pairs[300:]) / 100
    assert bag(pairs).accuracy(range(300), range(300, 400)) == pytest.approx(yes)


def test_word_order_counts_by_pairs_of_words():
    rng = random.Random(1)
    ordered = bag(((talk(rng) + " yes indeed"), (talk(rng) + " indeed yes")) for _ in range(300))
    assert ordered.accuracy(range(200), range(200, 300)) > 0.9


def test_it_sees_the_two_answers_alone_and_both_alike():
    rng = random.Random(2)
    made = [(talk(rng, "sorry"), talk(rng)) for _ in range(200)]
    right = bag(made).accuracy(range(100), range(100, 200))
    wrong = bag(made[:100] + [pair[::-1] for pair in made[100:]]).accuracy(range(100), range(100, 200))
    assert right + wrong == pytest.approx(1)


def test_the_demos_habit_is_a_surface_one():
    pairs = list(clean(candidates(open_rows("demo")))[0])
    made = bag((pair.chosen, pair.rejected) for pair in pairs)
    assert made.accuracy(*split_held_out(pairs, 40, 1)) > 0.97


def test_it_is_capped_in_size_and_takes_seconds(monkeypatch):
    monkeypatch.setattr(words, "PAIRS", 50)
    made = bag([("yes " * 10**5, "no " * 10**5)] * 60)
    assert len(made.rows) == 50
    began = time.monotonic()
    assert made.accuracy(range(60), range(40, 60)) == 1
    assert time.monotonic() - began < 5


def test_too_few_pairs_have_no_bar():
    few = bag([("a", "b")] * 10)
    assert few.accuracy(range(5), range(5, 10)) is None and said(None) == ""
    assert said(0.814) == (
        "A bag of words that never saw the prompt ranks 81% of them right: so far it may be style."
    )
