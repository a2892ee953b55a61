"""probe.py: each setting is tried lower and higher, and what is recommended is proven, or nothing is."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo.loss import TERMS
from lazyorpo_lib.results.evaluate import WHEN
from lazyorpo_lib.trials.probe import probe, recommend
from lazyorpo_lib.trials.runs import write_up
from tests.trials.test_recipes import read, tiny

RATES = (1e-3, 3.3e-4, 3e-3, 1e-3, 1e-3)
WEIGHTS = (0.5, 0.5, 0.5, 0.17, 1.5)


def recommended(gains, nlls, prompts=None):
    """What is recommended where these are the changes of the pairs: (trials, pairs)."""
    gains, nlls = np.array(gains, dtype=float), np.array(nlls, dtype=float)
    runs = [
        {"trial": f"trial {j}", "log_odds_ratio gain": g.mean(), "nll change": n.mean(),
         "learning_rate": RATES[j], "or_weight": WEIGHTS[j]}
        for j, (g, n) in enumerate(zip(gains, nlls, strict=True))
    ]  # fmt: skip
    prompts = range(gains.shape[1]) if prompts is None else prompts
    return recommend(runs, {"log_odds_ratio": gains, "nll": nlls}, prompts)


def pairs(mean, size=32, spread=0.3, seed=0):
    return mean + np.random.default_rng(seed).normal(0, spread, size)


@pytest.mark.parametrize(
    ("gains", "nlls", "best", "said"),
    [
        ([1, 2, 5, 0.5], [-1, -1, 0.5, -1], 1, "Recommended.*than with the settings as they are"),
        ([1, 2, 1.5, 3], [-1, -1, -1, -1], 3, "4 trials on 32 held-out pairs"),
        ([1, 2, 2, 1], [-1, -1, -1, -1], 1, "learning_rate 0|--learning-rate 0.00033"),  # of equal ones
        ([3, 1, 1, 2], [-1, -1, -1, -1], None, "None of 4 trials.*nothing is recommended"),
        ([1, 1.02, 0.99, 1.01], [-1, -1, -1, -1], None, "the most is trial.*nothing is recommended"),
        ([1, 1, 1, 1], [0.5, -0.5, 2, 0.5], 1, "fall of the held-out nll"),
        ([9, 1, 9, 9], [2, 0.5, 2, 2], 1, "nll rose in all that are better, so lower the learning rate"),
        ([1, 1, 1, 1], [0.5, 0.51, 0.9, 0.5], None, "nothing is recommended"),
    ],
)
def test_the_rule_of_the_probe(gains, nlls, best, said):
    equal = [pairs(g, seed=0 if g == 2 else j) for j, g in enumerate(gains)]
    out = recommended(equal, [pairs(n, spread=0.1, seed=9 + j) for j, n in enumerate(nlls)])
    wanted = {} if best is None else {"or_weight": WEIGHTS[best], "learning_rate": RATES[best]}
    assert out["recommended"] == wanted and re.search(said, out["said"][0])


def noise(chance, size=32, heavy=False):
    """Trials that learnt from labels which are noise: what a pair gains, it would lose with its answers
    swapped; larger rates move more, and trials go alike."""
    shared = chance.standard_t(2, size) if heavy else chance.normal(size=size)
    moves = [scale * (shared + chance.normal(size=size)) for scale in (1, 0.4, 2.5, 0.9, 1.2)]
    return np.array(moves) * chance.choice((-1, 1), size), chance.normal(-0.1, 0.2, (5, size))


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("size", [8, 32, 128])
def test_on_shuffled_labels_nothing_is_recommended_in_19_of_20_probes_at_least(size, heavy):
    chance = np.random.default_rng(size)
    found = [bool(recommended(*noise(chance, size, heavy))["recommended"]) for _ in range(100)]
    assert max(sum(found[i : i + 20]) for i in range(0, 100, 20)) <= 1 and sum(found) <= 3


def test_pairs_of_one_prompt_are_no_proof_of_their_own():
    rng = np.random.default_rng(1)
    gains = np.repeat(rng.normal(0, 1, (5, 8)), 32, axis=1)  # 8 prompts, 32 pairs of each
    gains[1] += 0.5
    nlls = np.full_like(gains, -0.1)
    assert recommended(gains, nlls)["recommended"]
    assert not recommended(gains, nlls, np.repeat(np.arange(8), 32))["recommended"]


def trained(monkeypatch, figures, minutes=1.0):
    """In the place of training: `figures(settings)` gives what log-odds ratio and nll of each pair change."""
    seen = []

    def run(settings, show):
        seen.append(settings)
        gain, nll = figures(settings)
        tables = []
        for part in (0.0, 1.0):
            row = dict.fromkeys(TERMS, 0.0) | {"nll_tokens": 1.0}
            tables.append([
                [(row | {"log_odds_chosen": g * part, "nll": 3 + n * part})[name] for name in TERMS]
                for g, n in zip(gain, nll, strict=True)
            ])  # fmt: skip
        Path(settings.output_dir).mkdir(parents=True)
        held_out = {"columns": TERMS, "prompts": [], "chosen_shorter": [True] * len(gain)}
        held_out |= {when: {"pairs": t, "answers": []} for when, t in zip(WHEN, tables, strict=True)}
        text = json.dumps(held_out).replace("NaN", "null")
        Path(settings.output_dir, "held_out.json").write_text(text)
        Path(settings.output_dir, "summary.json").write_text(json.dumps({"minutes": minutes / 5}))

    monkeypatch.setattr("lazyorpo_lib.trials.probe.run_apart", run)
    return seen


def test_probe_tries_each_setting_lower_and_higher_and_writes_what_it_decided_from(tmp_path, monkeypatch):
    def figures(s):
        """Its margin is the larger the larger or_weight and rate; too large a rate costs likelihood."""
        gain = 1e3 * s.or_weight * s.learning_rate
        return pairs(gain, 24), pairs(100 * (s.learning_rate - 5e-3), 24, 0.01)

    seen = trained(monkeypatch, figures)
    home = probe(tiny(tmp_path, or_weight=0.3, learning_rate=3e-3), steps=5)
    out = read(home, "probe.json")
    assert {(s.max_steps, s.objective, s.answers) for s in seen} == {(5, "orpo", 0)}
    assert max(s.eval_pairs for s in seen) <= 32
    assert [(run["or_weight"], run["learning_rate"]) for run in out["runs"]] == [
        (0.3, 3e-3), (0.3, 1e-3), (0.3, 9e-3), (0.1, 3e-3), (0.9, 3e-3),
    ]  # fmt: skip
    assert out["recommended"] == {"or_weight": 0.9, "learning_rate": 3e-3}
    assert "Recommended: --or-weight 0.9 --learning-rate 0.003" in (home / "probe.md").read_text()
    assert (home / "probe.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("minutes", "rounds"), [(0.0, [5]), (2.9, [5]), (3.1, [5, 10]), (7.5, [5, 10, 20]), (100, [5, 10, 20])]
)
def test_a_probe_that_cannot_tell_takes_more_steps_and_pairs_as_long_as_there_is_time(
    tmp_path, monkeypatch, minutes, rounds
):
    def figures(s):  # the rate shows after 20 steps alone
        shown = 3.0 if s.max_steps >= 20 and s.learning_rate > 3e-3 else 0.0
        return pairs(1 + shown, s.eval_pairs, 0.5), pairs(-1, s.eval_pairs, 0.1)

    seen, said = trained(monkeypatch, figures), []
    home = probe(
        tiny(tmp_path, learning_rate=3e-3, max_minutes=minutes, eval_pairs=32), steps=5, show=said.append
    )
    out = read(home, "probe.json")
    assert [s.max_steps for s in seen[::5]] == rounds
    assert [s.eval_pairs for s in seen[::5]] == [32 * 2**k for k in range(len(rounds))]
    assert {s.max_minutes for s in seen} == {0.0} and len(said) == len(rounds) - 1
    if rounds[-1] == 20:
        assert out["recommended"]["learning_rate"] == 9e-3
    else:
        assert out["recommended"] == {} and "or more lets it go on" in out["said"][1]


def test_the_last_round_of_a_probe_promises_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr("lazyorpo_lib.trials.probe.ROUNDS", 2)
    trained(monkeypatch, lambda s: (pairs(1, s.eval_pairs, 0.5), pairs(-1, s.eval_pairs, 0.1)))
    home = probe(tiny(tmp_path, max_minutes=100, eval_pairs=32), steps=5, show=lambda line: None)
    said = read(home, "probe.json")["said"][1]
    assert "2 rounds are the most: give it more pairs" in said and "lets it go on" not in said


def test_a_trial_whose_loss_is_no_number_recommends_nothing(tmp_path, monkeypatch):
    trained(monkeypatch, lambda s: (pairs(1), pairs(-1 if s.learning_rate < limit else np.nan)))
    limit = 5e-3
    home = probe(tiny(tmp_path / "a", learning_rate=3e-3), steps=5)
    assert len(read(home, "probe.json")["runs"]) == 4
    limit = 0
    with pytest.raises(UserError, match="no longer a number: lower learning_rate"):
        probe(tiny(tmp_path / "b", learning_rate=3e-3), steps=5)


@pytest.mark.parametrize("failing", ["probe.json", "probe.md", "probe.png"])
def test_a_full_disk_under_what_a_probe_writes_is_one_sentence(tmp_path, monkeypatch, failing):
    def write(path, data):
        if path.name == failing:
            raise OSError(28, "No space left on device", str(path))

    for module in ("trials.runs", "results.live"):
        monkeypatch.setattr(f"lazyorpo_lib.{module}.write_atomically", write)
    (tmp_path / "probe").mkdir()
    with pytest.raises(UserError, match="Nothing more can be written to .*probe.*run this again"):
        write_up(tmp_path / "probe", "trial", [{"trial": "a", "x": 1.0}], {"x": "x"}, {"said": []})
