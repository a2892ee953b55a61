"""Which step is kept: that with the lowest held-out loss, whatever interrupts the run that finds it."""

import itertools
import math
import shutil

import pytest

from lazyorpo_lib.errors import UserError
from lazyorpo_lib.orpo import checkpoints
from lazyorpo_lib.orpo.best import Best, take_best
from lazyorpo_lib.session import Stop, Stopped
from lazyorpo_lib.settings import Settings
from tests.conftest import random_pairs
from tests.orpo.test_trainer import make, same, trained, weights

PAIRS = random_pairs(32)
WORSE = dict(
    max_steps=8, learning_rate=0.03, keep="best", save_every_steps=3, keep_checkpoints=1
)  # from 5 on


def going(folder, *, rows=None, **changes):
    return make(folder, PAIRS[:24], eval_pairs=PAIRS[24:], rows=rows, **(WORSE | changes))


def ended(trainer, resume_from=None):
    """The weights that are kept, and the step that they are of."""
    take_best(trained(trainer, resume_from))
    return weights(trainer), trainer.best.step


def newest(folder):
    return checkpoints.newest(folder, sharded=False, show=print)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder, rows = tmp_path_factory.mktemp("straight"), []
    trainer = going(folder, rows=rows)
    return *ended(trainer), rows, folder


def looked(losses, planned=10, **changes):
    """What is known after these losses, of evaluations at every step, and the steps taken."""
    best = Best(Settings(keep="best", eval_every_steps=1, **changes), planned, 8)
    for step, loss in enumerate(losses, 1):
        if step <= best.steps and best.is_due(step):
            best.take_in(step, loss)
    return best


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_weights_that_are_kept_are_those_of_the_lowest_held_out_loss(tmp_path, method):
    rows, after = [], {}
    trainer = going(tmp_path, rows=rows, method=method, learning_rate={"lora": 0.03, "full": 0.01}[method])
    trainer.on_step = lambda step: after.setdefault(step, weights(trainer))
    kept, step = ended(trainer)
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert list(losses) == list(range(1, 9)) and step == min(losses, key=losses.get) < 8
    assert same(kept, after[step]) and not same(kept, after[8]) and trainer.step == 8
    assert trainer.evaluate()["eval_loss"] == losses[step]


def test_looking_for_the_best_changes_no_step(tmp_path, straight):
    rows = []
    trained(last := going(tmp_path, rows=rows, keep="last"))
    found = [[row["loss"] for row in some if "loss" in row] for some in (rows, straight[2])]
    assert found[0] == found[1] and len(found[0]) == 8
    whole = trained(going(tmp_path / "best"), straight[3] / "checkpoint-8")
    assert same(weights(last), weights(whole))
    assert not any("eval_loss" in row for row in rows) and take_best(last) is None and last.best.told() == {}


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "moment, at",
    [*itertools.product(["evaluated", "stepped", "signal"], [4, 8]), ("stepped", 5), ("saved", 4)],
)
def test_going_on_from_any_moment_finds_the_same_best(tmp_path, straight, moment, at):
    """A kill after an evaluation, after a step before its checkpoint, after a checkpoint; a signal that
    breaks an evaluation off."""
    trainer = going(tmp_path, hooks=dict(stop=Stop()))

    def struck(*given):
        row = given[0] if given and isinstance(given[0], dict) else {"eval_loss": 0}
        if trainer.step == at and "eval_loss" in row:
            raise Killed

    def broken_off(pairs):
        if trainer.step < at:
            return tables(pairs)
        trainer.stop.reason, trainer.stop.asked = "interrupted", True
        trainer.stop.hurried = True
        raise Stopped

    tables = trainer.pair_tables
    where = {"evaluated": "on_row", "stepped": "on_step", "saved": "on_save", "signal": "pair_tables"}[moment]
    setattr(trainer, where, broken_off if moment == "signal" else struck)
    try:
        ended(trainer)
    except Killed:
        pass
    last = checkpoints.go_on(tmp_path, sharded=False, main=True, show=str)
    kept, step = ended(going(tmp_path), last)
    assert step == straight[1] == 4 and same(kept, straight[0])


def test_one_best_checkpoint_stays_beside_the_newest_and_goes_at_the_end(straight):
    assert [c.name for c in checkpoints.complete(straight[3])] == ["checkpoint-4", "checkpoint-8"]
    folder = straight[3].with_name("copy")
    checkpoints.remove(shutil.copytree(straight[3], folder))
    assert not checkpoints.numbered(folder)


def test_a_best_checkpoint_that_a_disk_has_changed_is_told_and_the_last_step_kept(tmp_path, straight):
    shutil.copytree(straight[3], tmp_path, dirs_exist_ok=True)
    weights_file = tmp_path / "checkpoint-4" / "weights.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-8] + bytes(8))
    trainer = going(tmp_path)
    with pytest.warns(UserWarning, match="checkpoint-4, the best, is damaged or gone: the last step is kept"):
        _, step = ended(trainer, newest(tmp_path))
    assert step is None and trainer.best.told() == {} and trainer.step == 8


def test_patience_ends_training_and_going_on_takes_no_step_more(tmp_path):
    trainer = going(tmp_path, patience=2, save_every_steps=1)
    assert ended(trainer)[1] == 4 and trainer.step == trainer.steps == 6
    assert trainer.best.early() == "patience was over: 2 evaluations without a better step"
    again = going(tmp_path, rows=(rows := []), patience=2)
    assert ended(again, newest(tmp_path))[1] == 4 and again.step == 6 and not rows


@pytest.mark.parametrize(
    "losses, patience, step, taken",
    [
        ([3, 2, 1], 0, 3, 10),
        ([1, 2, 3, 4, 5], 0, 1, 10),
        ([3, 2, 2, 2, 1], 0, 5, 10),
        ([3, 2, 2, 2, 1], 2, 2, 4),  # as low is no better
        ([1, 2, 0, 3, 3], 2, 3, 5),
        ([math.nan, 2, math.nan, math.nan], 2, 2, 4),
        ([math.nan, math.nan, 1], 2, None, 2),
    ],
)
def test_the_lowest_loss_is_the_best_and_patience_counts_from_it(losses, patience, step, taken):
    best = looked(losses, patience=patience)
    assert (best.step, best.steps) == (step, taken)
    assert best.told().get("kept_step") == step


@pytest.mark.parametrize(
    "planned, held_out, every, looks, pairs",
    [
        (8, 8, 0, 8, 8),
        (40, 40, 0, 10, 40),
        (41, 385, 0, 9, 97),
        (1000, 100, 0, 10, 100),
        (40, 385, 7, 6, 385),
    ],
)
def test_a_run_is_looked_at_about_ten_times_on_at_most_a_hundred_pairs(
    planned, held_out, every, looks, pairs
):
    best = Best(Settings(keep="best", eval_every_steps=every), planned, held_out)
    assert sum(best.is_due(step) for step in range(planned + 1)) == looks and best.is_due(planned)
    assert len(range(0, held_out, best.stride)) == pairs


def test_no_held_out_pair_is_one_sentence(tmp_path):
    with pytest.raises(
        UserError, match="keep is best, and eval_pairs is 0: give some to decide by, or set keep=last"
    ):
        Settings(keep="best", eval_pairs=0)
    with pytest.raises(UserError, match="so few pairs leave none to decide by: add some, or keep=last"):
        make(tmp_path, PAIRS, keep="best")
    with pytest.raises(UserError, match="patience is 3, but keep is last: set keep=best, or patience=0"):
        Settings(patience=3)
