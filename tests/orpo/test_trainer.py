"""The step: independent of its split, exact in resuming, honest when memory or numbers fail; the same as
TRL's."""

import gc
import math
import os
import shutil
import sys
import types
import warnings
import weakref
from collections import defaultdict
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from accelerate.state import GradientState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config

from lazyorpo_lib import marker, session
from lazyorpo_lib.errors import UserError
from lazyorpo_lib.fast.layouts import PairScorer
from lazyorpo_lib.machine import Machine
from lazyorpo_lib.marker import MARKER
from lazyorpo_lib.model import (
    adapters_off,
    add_adapters,
    causal_lm,
    check_liger,
    load_base,
    load_for_training,
)
from lazyorpo_lib.orpo import checkpoints, optimizers, processes
from lazyorpo_lib.orpo import loss as formulas
from lazyorpo_lib.orpo.batching import EncodedPair, collate
from lazyorpo_lib.orpo.body import checkpoint_layers
from lazyorpo_lib.orpo.loss import TERMS, metrics
from lazyorpo_lib.orpo.processes import make_accelerator
from lazyorpo_lib.orpo.trainer import OrpoTrainer
from lazyorpo_lib.session import Stop
from lazyorpo_lib.settings import Settings
from tests.architectures import tiny_model
from tests.conftest import bitsandbytes_on_the_cpu, booby_trap, random_pairs

SETTINGS = dict(
    method="lora",
    pairs_per_step=8,
    learning_rate=1e-2,
    save_every_steps=0,
    lora_rank=4,
    lora_alpha=8,
    max_steps=4,
)


def make(
    folder,
    pairs,
    *,
    model=None,
    tokens_per_batch=10**6,
    rows=None,
    eval_pairs=(),
    hooks=MappingProxyType({}),
    **changes,
):
    settings = Settings(**(SETTINGS | changes))
    model = tiny_model("llama") if model is None else model
    if settings.method == "lora" and not hasattr(model, "peft_config"):
        torch.manual_seed(0)
        model = add_adapters(model, settings)
    folder = Path(folder)
    return OrpoTrainer(
        model,
        settings,
        pairs,
        eval_pairs,
        accelerator=make_accelerator(settings, dtype=torch.float32, device="cpu", folder=folder),
        folder=folder,
        make_scorer=lambda model: PairScorer(causal_lm(model)),
        tokens_per_batch=tokens_per_batch,
        on_row=(rows if rows is not None else []).append,
        **hooks,
    )


def trained(trainer, resume_from=None):
    """The trainer after all that it does, from the beginning or from a checkpoint."""
    trainer.prepare(resume_from)
    trainer.train()
    trainer.close()
    return trainer


def gradients(trainer, pairs):
    trainer.model.zero_grad()
    s, sums = trainer.settings, trainer._gradient(pairs).tolist()
    loss = torch.tensor(metrics(sums[:-2], s.or_weight, s.objective)["loss"])
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), grads


def relative(a, b):
    flat = [torch.cat([g.flatten() for g in x.values()]) for x in (a, b)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("nll_over", ["answer", "prompt+answer"])
def test_gradient_of_a_step_does_not_depend_on_its_split(tmp_path, method, nll_over):
    pairs = random_pairs(8)
    trainer = make(tmp_path, pairs, method=method, nll_over=nll_over)
    results = []
    for budget in (1, 100, 200, 10**6):
        trainer.tokens_per_batch = budget
        results.append((len(trainer._micro_batches(pairs)), *gradients(trainer, pairs)))
    assert len({count for count, *_ in results}) == 4 and results[0][0] == 8 and results[-1][0] == 1
    for _, loss, grads in results[:-1]:
        assert loss == pytest.approx(results[-1][1], rel=1e-6)
        assert relative(grads, results[-1][2]) < 1e-5


def test_a_step_is_taken_in_training_mode_also_where_only_the_base_model_was_left_in_evaluation(tmp_path):
    trainer = make(tmp_path, pairs := random_pairs(4))
    trainer.model.train().get_base_model().eval()  # as from_pretrained leaves it under a new adapter
    trainer._gradient(pairs)
    assert all(module.training for module in trainer.model.modules())


def test_checkpointed_layers_change_no_gradient(tmp_path):
    pairs = random_pairs(6)
    trainer = make(tmp_path, pairs)
    plain = gradients(trainer, pairs)[1]
    for layers in (1, 2):
        assert checkpoint_layers(trainer.model, layers) == layers
        assert relative(gradients(trainer, pairs)[1], plain) < 1e-6


def pair_table64(logps, batch):
    """`pair_table`, in float64 throughout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        patch.setattr(
            torch, "zeros", lambda *shape, device: torch.full(shape, 0.0, dtype=torch.float64, device=device)
        )
        return formulas.pair_table(logps, batch.segment, batch.lengths)


class HostReads(TorchDispatchMode):
    """Counts how often a tensor's value is asked for: on a GPU each time waits for all that was queued. So
    does a copy of a list, or a blocking one of a batch's whole numbers, to the device."""

    def __enter__(self):
        self.reads, self.copies, self.calls = 0, 0, _Calls(self)
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.reads += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """What a CPU's tensors do without dispatching anything."""

    def __init__(self, counter):
        self.counter = counter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.counter.reads += function is Tensor.tolist
        made = (
            function in (torch.tensor, torch.as_tensor)
            and kwargs.get("device")
            and not isinstance(args[0], Tensor)
        )
        moved = (
            function is Tensor.to and not args[0].is_floating_point() and not kwargs.get("non_blocking")
        )  # torch moves norms, to where they are
        moved = moved and any(isinstance(a, str | torch.device) for a in args[1:])
        self.counter.copies += bool(made or moved)
        return function(*args, **kwargs)


def test_the_counter_of_host_reads_counts_them():
    with HostReads() as found:
        one = torch.ones(2)
        one.tolist(), one.sum().item(), bool(one.sum() > 1)
        whole = torch.tensor([1], device="cpu")
        whole.to("cpu"), whole.to("cpu", non_blocking=True), whole.to(torch.float64), torch.tensor([1])
    assert (found.reads, found.copies) == (3, 2)


@pytest.mark.parametrize("log_every", [1000, 1])
def test_a_step_waits_for_the_device_once_however_it_is_split(tmp_path, log_every):
    counts = []
    for steps in (2, 6):
        trainer = make(
            tmp_path, random_pairs(48), max_steps=steps, log_every_steps=log_every, tokens_per_batch=60
        )
        with HostReads() as found:
            trained(trainer)
        counts.append((found.reads, found.copies))
    assert counts[1][0] - counts[0][0] == 4
    assert counts[1][1] == counts[0][1], "no micro-batch waits for a copy"


@pytest.mark.parametrize("nll_over", ["answer", "prompt+answer"])
def test_the_norms_of_the_two_terms_are_those_of_their_gradients(nll_over):
    pairs = [*random_pairs(6), EncodedPair(6, [5, 6], [7] * 90, [8])]
    batch = collate(pairs, nll_over=nll_over)
    logps = -torch.rand(len(batch.targets), dtype=torch.float64) * 9
    logps[batch.segment == 3] = -1e-9  # an answer that is all but certain, past which the odds are held
    logps.requires_grad_()
    column = dict(zip(TERMS, (table := pair_table64(logps, batch)).T, strict=True))
    terms = column["nll"].sum() / 50, 0.3 * column["or_loss"].sum() / 9
    true = torch.stack(
        [torch.autograd.grad(term, logps, retain_graph=True)[0].square().sum() for term in terms]
    )
    found = formulas.gradient_norms(
        table.detach(), batch.lengths.double(), nll_tokens=50, pairs=9, or_weight=0.3
    )
    torch.testing.assert_close(found, true, rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", ["orpo", "sft"])
def test_the_logged_loss_is_made_of_the_logged_terms(tmp_path, objective):
    rows = []
    trained(make(tmp_path, random_pairs(16), rows=rows, objective=objective, or_weight=0.3))
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["loss"] == pytest.approx(
            row["nll"] + (0.3 * row["or_loss"] if objective == "orpo" else 0), rel=1e-5
        )
        assert row["log_odds_ratio"] == pytest.approx(
            row["log_odds_chosen"] - row["log_odds_rejected"], rel=1e-5
        )
        assert row["pairs_per_second"] > 0 and row["memory_gib"] > 0 and row["grad_norm"] > 0


def test_a_tracker_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="report_to is wandb, .* pip install wandb, or set report_to=none"):
        make(tmp_path, random_pairs(8), report_to="wandb")


def test_preparing_again_keeps_nothing_of_the_optimizer_before(tmp_path):
    trainer = make(tmp_path, random_pairs(16), max_steps=2, save_every_steps=1)
    trained(trainer)
    older = weakref.ref(trainer.optimizer.optimizer)
    trained(trainer, tmp_path / "checkpoint-1")
    gc.collect()
    assert trainer.step == 2 and older() is None


def test_what_another_library_left_in_this_process_changes_no_step(tmp_path, monkeypatch):
    """A Trainer that was interrupted while it gathered gradients; accelerate launch's number of them."""
    found = []
    for spoiled in (False, True):
        if spoiled:
            GradientState()._set_sync_gradients(False)
            monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
        trainer = make(tmp_path / str(spoiled), random_pairs(16), rows=(rows := []), max_steps=3)
        found.append((weights(trained(trainer)), [row["grad_norm"] for row in rows]))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_a_trainer_that_took_steps_is_not_prepared_for_a_new_beginning(tmp_path):
    trainer = trained(make(tmp_path, random_pairs(16), max_steps=2))
    with pytest.raises(RuntimeError, match="trained already"):
        trainer.prepare()


def test_preparing_again_logs_every_row_once(tmp_path):
    pytest.importorskip("tensorboard")
    trainer = make(tmp_path, random_pairs(16), max_steps=2, report_to="tensorboard")
    trainer.prepare()
    trained(trainer)
    assert len(trainer.accelerator.trackers) == 1


@pytest.mark.parametrize("hurt", [lambda data: bytes(len(data)), lambda data: data[:-200] + bytes(200)])
def test_a_damaged_checkpoint_is_one_sentence_and_changes_no_weight(tmp_path, saved, hurt):
    checkpoint = shutil.copytree(saved / "checkpoint-2", tmp_path / "checkpoint-2")
    optimizer = checkpoint / "optimizer.pt"
    optimizer.write_bytes(hurt(optimizer.read_bytes()))
    trainer = make(tmp_path / "run", random_pairs(16))
    before = weights(trainer)
    with pytest.raises(UserError, match="damaged, or holds code"):
        trainer.prepare(checkpoint)
    assert same(before, weights(trainer)) and trainer.step == 0


def test_another_objective_changes_what_is_trained_evaluated_and_logged(tmp_path, monkeypatch):
    pairs, found = random_pairs(16), []
    for changed in (False, True):
        if changed:  # the rejected answers alone
            monkeypatch.setattr(
                formulas, "objective", lambda sums, *, nll_tokens, pairs, **_: sums["logp_rejected"] / pairs
            )
        trainer = make(tmp_path / str(changed), pairs[:8], rows=(rows := []), eval_pairs=pairs[8:])
        trained(trainer)
        found.append((weights(trainer), rows[0]["loss"], trainer.evaluate()["eval_loss"], rows))
    before, after = found
    assert relative(before[0], after[0]) > 0.1, "other weights are learned"
    assert after[1] == pytest.approx(after[3][0]["logp_rejected"]) != pytest.approx(before[1])
    assert after[2] == pytest.approx(after[3][-1]["eval_logp_rejected"]) != pytest.approx(before[2])


def test_training_on_few_pairs_parts_their_log_odds(tmp_path):
    rows = []
    trained(make(tmp_path, random_pairs(8), rows=rows, max_steps=30, or_weight=1.0, lr_schedule="constant"))
    assert rows[-1]["accuracy"] == 1.0 and rows[-1]["log_odds_ratio"] > rows[0]["log_odds_ratio"] + 1
    assert rows[-1]["nll"] < rows[0]["nll"]


def test_resuming_in_the_middle_of_an_epoch_is_exact_with_dropout_on(tmp_path):
    pairs, options = (
        random_pairs(40),
        dict(max_steps=8, lora_dropout=0.3, save_every_steps=3, keep_checkpoints=5),
    )
    whole, rows = make(tmp_path / "a", pairs, **options), []
    trained(whole)
    resumed = make(tmp_path / "b", pairs, rows=rows, **options)
    trained(resumed, tmp_path / "a" / "checkpoint-3")
    assert [r["step"] for r in rows] == [4, 5, 6, 7, 8]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_resuming_from_the_last_checkpoint_takes_no_step_more(tmp_path):
    pairs, options, rows = random_pairs(16), dict(max_steps=3, save_every_steps=3, lr_schedule="constant"), []
    whole = make(tmp_path / "a", pairs, **options)
    trained(whole)
    resumed = make(tmp_path / "b", pairs, rows=rows, **options)
    trained(resumed, tmp_path / "a" / "checkpoint-3")
    assert resumed.step == 3 and not rows
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_a_checkpoint_appears_complete_or_not_at_all_and_old_ones_go(tmp_path):
    trainer = make(tmp_path, random_pairs(16), max_steps=6, save_every_steps=1, keep_checkpoints=2)
    trained(trainer)
    assert [c.name for c in checkpoints.complete(tmp_path)] == ["checkpoint-5", "checkpoint-6"]
    assert not (tmp_path / ".saving").exists() and not (tmp_path / ".old").exists()


def test_a_full_disk_while_saving_keeps_the_last_complete_checkpoint(tmp_path, monkeypatch):
    trainer = make(tmp_path, random_pairs(16), max_steps=4, save_every_steps=2)
    save = checkpoints.save_file

    def full(*args):
        if trainer.step == 4:
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        trained(trainer)
    assert [c.name for c in checkpoints.complete(tmp_path)] == ["checkpoint-2"]


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.pt", "progress.json"])
def test_a_full_disk_is_one_sentence_whichever_library_meets_it(tmp_path, monkeypatch, file):
    resource = pytest.importorskip("resource")
    trainer = make(tmp_path, random_pairs(16), max_steps=4, save_every_steps=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    draws = checkpoints._draws

    def fill_the_disk(device):
        if trainer.step == 4:
            room = (tmp_path / "checkpoint-2" / file).stat().st_size // 2
            if file == "progress.json":  # the small one that Python itself writes: the large ones must pass
                monkeypatch.setattr(checkpoints, "PROGRESS", "../../../../../../../../../../dev/full")
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        return draws(device)

    monkeypatch.setattr(checkpoints, "_draws", fill_the_disk)
    try:
        with pytest.raises(UserError, match="Nothing more can be written to .* make room, then run again"):
            trained(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [c.name for c in checkpoints.complete(tmp_path)] == ["checkpoint-2"]
    assert not (tmp_path / ".saving").exists()


@pytest.mark.parametrize("minutes,steps", [(10, []), (2.5, [3, 6]), (0, [])])
def test_checkpoints_are_written_by_the_clock_and_none_in_a_run_that_is_shorter(
    tmp_path, monkeypatch, minutes, steps
):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(session.time, "monotonic", lambda: clock.now)

    def minute(*_):
        clock.now += 60

    trainer = make(
        tmp_path,
        random_pairs(80),
        max_steps=7,
        save_every_minutes=minutes,
        keep_checkpoints=9,
        hooks=dict(on_step=minute),
    )
    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda *args, **kw: (save(*args, **kw), minute(), minute()))
    trained(trainer)  # a minute a step, two to write a checkpoint, which do not count
    assert [checkpoints.step_of(c) for c in checkpoints.complete(tmp_path)] == steps


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_paged_state_of_the_optimizer_is_paged_again_after_a_resume(tmp_path, monkeypatch, optimizer):
    bitsandbytes = bitsandbytes_on_the_cpu()

    def in_pages(self, parameter, dtype=torch.float32):  # what only CUDA has
        buffer = torch.zeros_like(parameter, dtype=dtype)
        buffer.is_paged = True
        return buffer

    monkeypatch.setattr(bitsandbytes.optim.optimizer.Optimizer8bit, "get_state_buffer", in_pages)
    monkeypatch.setattr(bitsandbytes.functional, "prefetch_tensor", lambda tensor: None)
    options = dict(max_steps=4, save_every_steps=2, optimizer=optimizer, method="full", learning_rate=1e-3)
    whole = make(tmp_path / "a", random_pairs(40), **options)
    trained(whole)
    resumed = make(tmp_path / "b", random_pairs(40), **options)
    trained(resumed, tmp_path / "a" / "checkpoint-2")
    states = list(resumed.optimizer.optimizer.state.values())
    assert states and all(
        getattr(state[name], "is_paged", False) for state in states for name in ("state1", "state2")
    )
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with checkpoint-2 and checkpoint-4; never changed by a test."""
    folder = tmp_path_factory.mktemp("saved")
    trained(make(folder, random_pairs(16), max_steps=4, save_every_steps=2))
    return folder


@pytest.mark.parametrize("tear", [lambda f: os.truncate(f, f.stat().st_size - 1), lambda f: f.unlink()])
@pytest.mark.parametrize(
    "file", ["weights.safetensors", "optimizer.pt", "random_0.pt", "progress.json", MARKER]
)
def test_a_torn_checkpoint_is_passed_over_and_goes_with_the_old_ones(tmp_path, saved, file, tear):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    assert [c.name for c in checkpoints.complete(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    tear(tmp_path / "checkpoint-4" / file)
    assert [c.name for c in checkpoints.complete(tmp_path)] == ["checkpoint-2"]
    checkpoints.remove(tmp_path, keep=1)
    assert [c.name for c in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("file", ["optimizer.pt", "random_0.pt", "weights.safetensors", "weights.bin"])
def test_a_pickle_planted_in_a_checkpoint_is_never_run(tmp_path, saved, file):
    checkpoint = shutil.copytree(saved / "checkpoint-2", tmp_path / "checkpoint-2")
    (checkpoint / file).write_bytes(booby_trap(tmp_path / "sprung"))
    trainer = make(tmp_path / "run", random_pairs(16))
    if file == "weights.bin":  # nobody reads it
        trained(trainer, checkpoint)
    else:
        with pytest.raises(UserError, match="damaged, or holds code, which is never run: delete that folder"):
            trained(trainer, checkpoint)
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match="an earlier version .* choose another output_dir"):
        trained(make(tmp_path / "run", random_pairs(16)), tmp_path)


@pytest.mark.parametrize(
    "other,reason", [([0, 0, 0], ""), ([1, 0, 0], "another process"), ([1, 1, 1], "another process")]
)
def test_a_stop_that_one_process_was_asked_for_ends_the_step_of_all(tmp_path, monkeypatch, other, reason):
    told, stop = [], Stop(tmp_path / "STOP")
    marker.take(tmp_path, "run", "STOP")
    trainer = make(tmp_path, random_pairs(40), hooks=dict(stop=stop), max_steps=9)
    trainer.world, trainer.step = 2, 1

    def gather(mine):
        told.append(mine.tolist()[0])
        return torch.cat([mine, torch.tensor([other], dtype=mine.dtype)])

    monkeypatch.setattr(trainer.accelerator, "gather", gather)
    assert trainer._asked_to_stop() == bool(other[0])
    assert told == [[0, 0, 0]] and stop.reason.startswith(reason)
    assert stop.asked == bool(other[1]) and stop.hurried == bool(other[2])
    (tmp_path / "STOP").touch()
    assert trainer._asked_to_stop() and "STOP" in stop.reason
    assert told[1] == [1, 1, stop.hurried]


def test_out_of_memory_halves_the_budget_then_checkpoints_layers_and_repeats_the_step(tmp_path):
    pairs, results = random_pairs(16), {}
    for limit in (10**9, 60):
        trainer = make(tmp_path / str(limit), pairs, max_steps=3, lr_schedule="constant")
        inner = trainer.scorer.forward.original

        def forward(*args, limit=limit, inner=inner, trainer=trainer, **kwargs):
            if kwargs["input_ids"].numel() > limit + 10 * trainer.checkpointed_layers:
                raise torch.OutOfMemoryError("injected")
            return inner(*args, **kwargs)

        trainer.scorer.forward.original = forward
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trained(trainer)
        results[limit] = weights(trainer), trainer.oom_notes, trainer.step
    assert results[10**9][1] == [] and results[60][2] == 3
    notes = " ".join(results[60][1])
    assert "tokens_per_batch is now" in notes and "layers are now checkpointed" in notes
    assert relative(results[60][0], results[10**9][0]) < 1e-4


def test_out_of_memory_on_one_long_pair_checkpoints_layers_and_leaves_the_budget_alone(tmp_path):
    short = random_pairs(6, longest=5)
    pairs = [*short, short[0]._replace(index=6, chosen=[7] * 100)]
    trainer = make(tmp_path, pairs, tokens_per_batch=60, pairs_per_step=7, max_steps=2)
    inner = trainer.scorer.forward.original

    def forward(*args, **kwargs):
        if kwargs["input_ids"].numel() > 100 and not trainer.checkpointed_layers:
            raise torch.OutOfMemoryError("injected")
        return inner(*args, **kwargs)

    trainer.scorer.forward.original = forward
    with pytest.warns(UserWarning, match="layers are now checkpointed"):
        trained(trainer)
    assert trainer.tokens_per_batch == 60 and trainer.step == 2 and len(trainer.oom_notes) == 1


def test_a_step_repeated_after_out_of_memory_counts_its_work_once(tmp_path):
    tokens = []
    for fails in (False, True):
        rows, pairs = [], random_pairs(8)
        trainer = make(
            tmp_path,
            pairs,
            rows=rows,
            max_steps=1,
            tokens_per_batch=max(p.tokens() for p in pairs),
            warmup_steps=0,
        )
        inner, calls = trainer.scorer.forward.original, []

        def forward(*args, inner=inner, calls=calls, fails=fails, **kwargs):
            calls.append(1)
            if fails and len(calls) == 3:
                raise torch.OutOfMemoryError("injected")
            return inner(*args, **kwargs)

        trainer.scorer.forward.original = forward
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trained(trainer)
        assert len(trainer.oom_notes) == fails
        tokens.append(rows[0]["tokens"])
    assert tokens[0] == tokens[1] == sum(p.tokens() for p in pairs)


def test_out_of_memory_in_evaluation_shrinks_its_batches_and_changes_no_figure(tmp_path):
    pairs = random_pairs(12)
    trainer = make(tmp_path, pairs[:4], eval_pairs=pairs)
    whole, inner = trainer.pair_tables(pairs), trainer.scorer.forward.original

    def forward(*args, **kwargs):
        if kwargs["input_ids"].numel() > most:
            raise torch.OutOfMemoryError("injected")
        return inner(*args, **kwargs)

    trainer.scorer.forward.original, most = forward, max(p.tokens() for p in pairs)
    with pytest.warns(UserWarning, match="evaluation: out of memory"):
        torch.testing.assert_close(trainer.pair_tables(pairs), whole, rtol=1e-5, atol=1e-5)
    assert trainer.tokens_per_batch == 10**6 and trainer.model.training, "training's own budget stays"
    most = 5
    with (
        warnings.catch_warnings(),
        pytest.raises(UserError, match="evaluating a single pair .*lower max_tokens"),
    ):
        warnings.simplefilter("ignore")
        trainer.pair_tables(pairs)


def test_out_of_memory_of_dpos_reference_shrinks_its_batches(tmp_path):
    pairs, sums = random_pairs(8), []
    for limit in (10**9, 80):
        trainer = make(tmp_path, pairs, objective="dpo")
        inner = trainer.scorer.forward.original

        def forward(*args, inner=inner, limit=limit, **kwargs):
            if kwargs["input_ids"].numel() > limit:
                raise torch.OutOfMemoryError("injected")
            return inner(*args, **kwargs)

        trainer.scorer.forward.original = forward
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.reference.remember(pairs)
        sums.append(torch.stack([trainer.reference.sums[p.index] for p in pairs]))
    torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_the_optimizers_first_step_is_repeated_where_its_state_did_not_fit_and_updates_every_weight_once(
    tmp_path, monkeypatch, optimizer
):
    if optimizer == "adamw_8bit":
        bitsandbytes_on_the_cpu()
    results, zeros_like = [], torch.zeros_like
    options = dict(method="full", max_steps=3, optimizer=optimizer, weight_decay=0.1)
    for failing in ((), (9,), (4, 12)):  # which tensor of the state
        trainer, made = make(tmp_path, random_pairs(24), model=tiny_model("qwen2"), **options), []
        step = optimizers.step_again

        def counted(*args, failing=failing, made=made, step=step):
            def zeros(*given, **kwargs):
                made.append(1)
                if len(made) in failing:
                    raise torch.OutOfMemoryError("injected")
                return zeros_like(*given, **kwargs)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "zeros_like", zeros)
                return step(*args)

        monkeypatch.setattr(optimizers, "step_again", counted)
        if len(failing) < 2:
            trained(trainer)
            results.append(weights(trainer))
        else:
            with pytest.raises(UserError, match="optimizer's state .*optimizer=adamw_8bit"):
                trained(trainer)
        assert len(made) > 9
        monkeypatch.setattr(optimizers, "step_again", step)
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_out_of_memory_with_nothing_left_to_give_says_what_to_change(tmp_path):
    trainer = make(tmp_path, random_pairs(8))

    def forward(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    trainer.scorer.forward.original = forward
    with warnings.catch_warnings(), pytest.raises(UserError, match="lower max_tokens"):
        warnings.simplefilter("ignore")
        trained(trainer)


def _break_pairs(is_bad):
    """Give the pairs for which `is_bad(index)` a log-probability that is not a number."""
    table = OrpoTrainer._pair_table

    def broken(self, logps, batch):
        hurt = torch.tensor([torch.nan if is_bad(p.index) else 1.0 for p in batch.pairs])
        return table(self, logps * hurt.repeat(3)[batch.segment], batch)

    return broken


def test_a_step_that_is_not_finite_is_skipped_counted_and_its_rows_named(tmp_path, monkeypatch):
    pairs = random_pairs(16)
    rows, options = [], dict(max_steps=2, save_every_steps=2, log_every_steps=1)
    trainer = make(tmp_path, pairs, rows=rows, **options)
    monkeypatch.setattr(OrpoTrainer, "_pair_table", _break_pairs(lambda index: index == 3))
    before = weights(trainer)
    with pytest.warns(UserWarning, match="not finite"):
        trained(trainer)
    (bad,) = trainer.bad_steps
    assert 3 in bad["rows"] and len(bad["rows"]) == 8
    assert [row["step"] for row in rows if row["loss"] != row["loss"]] == [bad["step"]], (
        "the log hides no NaN"
    )
    resumed = make(tmp_path / "b", pairs, **options | dict(max_steps=3))
    monkeypatch.undo()
    trained(resumed, tmp_path / "checkpoint-2")
    assert resumed.bad_steps == [bad], "it is still counted after a resume"
    assert all(torch.isfinite(w).all() for w in weights(trainer).values())
    assert any(not torch.equal(w, before[n]) for n, w in weights(trainer).items())  # the other step did train


def test_odd_answers_have_finite_losses_and_gradients(tmp_path):
    shapes = {
        "one token": ([2], [7, 2]),
        "equal": ([9, 2], [9, 2]),
        "long": ([9] * 1500 + [2], [8, 2]),
        "longer": ([8, 2], [9] * 1500 + [2]),
    }
    pairs = [EncodedPair(i, [5, 6], *answers) for i, answers in enumerate(shapes.values())]
    trainer = make(tmp_path, pairs)
    for pair in pairs:
        loss, grads = gradients(trainer, [pair])
        assert math.isfinite(loss) and all(g.isfinite().all() for g in grads.values())
    table = trainer.pair_tables([pairs[1]])[0]
    assert table[TERMS.index("or_loss")].item() == pytest.approx(math.log(2))


# float16: loss scaling, with torch's scaler for the CPU, which does what CUDA's does.


def in_float16(folder, pairs, **options):
    """A trainer that computes in float16 and scales its loss, as on a T4."""
    trainer = make(folder, pairs, **options)
    accelerator, original = trainer.accelerator, trainer.model.forward
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    assert trainer.model.forward == original, "prepare() is what wraps it"
    return trainer


def weights_after_each_step(trainer):
    kept = [weights(trainer)]
    trainer.on_step = lambda step: kept.append(weights(trainer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained(trainer)
    return kept


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_float16_with_a_scaled_loss_trains_as_float32_does(tmp_path, method):
    rows, options = (
        {16: [], 32: []},
        dict(max_steps=12, method=method, learning_rate=3e-3, lr_schedule="constant", tokens_per_batch=150),
    )
    trained(make(tmp_path / "32", random_pairs(16), rows=rows[32], **options))
    trainer = in_float16(tmp_path / "16", random_pairs(16), rows=rows[16], **options)
    trained(trainer)
    assert not trainer.bad_steps and trainer.accelerator.scaler.get_scale() == 2.0**16
    for half, single in zip(rows[16], rows[32], strict=True):
        assert half["loss"] == pytest.approx(single["loss"], rel=0.02) and half["grad_norm"] == pytest.approx(
            single["grad_norm"], rel=0.1
        )


def overflowing(trainer, steps):
    """Let the gradient of one weight leave float16's range in these steps, the loss finite."""
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda grad: grad * torch.inf if trainer.step + 1 in steps else grad)


def test_an_overflow_of_float16_skips_its_step_alone_and_halves_the_scale(tmp_path):
    trainer = in_float16(tmp_path, random_pairs(40), max_steps=5)
    overflowing(trainer, {3})
    kept, scaler = weights_after_each_step(trainer), trainer.accelerator.scaler
    assert [same(a, b) for a, b in zip(kept, kept[1:], strict=False)] == [False, False, True, False, False]
    assert scaler.get_scale() == 2.0**15 and not trainer.bad_steps and not trainer.stop_reason
    assert all(w.isfinite().all() for w in kept[-1].values())


def test_an_overflow_costs_the_schedule_of_the_learning_rate_no_more_than_its_own_step(tmp_path):
    rates = {}
    for steps in (set(), {3}):
        trainer = in_float16(
            tmp_path / str(len(steps)), random_pairs(40), max_steps=6, warmup_steps=3, rows=(rows := [])
        )
        overflowing(trainer, steps)
        trained(trainer)
        rates[len(steps)] = [row["learning_rate"] for row in rows]
    assert rates[1] in (
        rates[0],
        rates[0][:3] + rates[0][2:5],
    )  # whether it was skipped a fused optimizer does not say


def test_the_scale_falls_for_16_steps_before_overflows_stop_the_run(tmp_path):
    trainer = in_float16(tmp_path, random_pairs(200), max_steps=25)
    overflowing(trainer, range(26))
    kept = weights_after_each_step(trainer)
    assert [bad["step"] for bad in trainer.bad_steps] == [
        17,
        18,
        19,
    ] and trainer.accelerator.scaler.get_scale() <= 1
    assert trainer.step == 19 and "precision=float32" in trainer.stop_reason and same(kept[0], kept[-1])


def test_a_loss_that_is_not_finite_is_a_bad_step_at_once_whatever_the_scale(tmp_path, monkeypatch):
    trainer = in_float16(tmp_path, random_pairs(64), max_steps=8)
    monkeypatch.setattr(OrpoTrainer, "_pair_table", _break_pairs(lambda index: True))
    kept = weights_after_each_step(trainer)
    assert trainer.step == 3 and "precision=float32" in trainer.stop_reason and same(kept[0], kept[-1])
    assert [c.name for c in checkpoints.complete(tmp_path)] == ["checkpoint-3"]


def test_a_row_that_is_not_a_number_is_named_in_float16_too(tmp_path, monkeypatch):
    trainer = in_float16(tmp_path, random_pairs(16), max_steps=4)
    monkeypatch.setattr(OrpoTrainer, "_pair_table", _break_pairs(lambda index: index == 3))
    kept = weights_after_each_step(trainer)
    steps = [bad["step"] for bad in trainer.bad_steps]
    assert len(steps) == 2 and all(3 in bad["rows"] for bad in trainer.bad_steps)
    assert [same(a, b) for a, b in zip(kept, kept[1:], strict=False)] == [
        step in steps for step in (1, 2, 3, 4)
    ]


def test_the_scale_goes_on_where_a_stopped_run_left_it(tmp_path):
    options = dict(max_steps=4, save_every_steps=2)
    first = in_float16(tmp_path / "a", random_pairs(40), **options)
    overflowing(first, {1})
    trained(first)
    again = in_float16(tmp_path / "b", random_pairs(40), **options)
    trained(again, tmp_path / "a" / "checkpoint-2")
    assert again.accelerator.scaler.get_scale() == first.accelerator.scaler.get_scale() == 2.0**15
    assert same(weights(first), weights(again))


def test_three_bad_steps_in_a_row_stop_the_run_with_a_checkpoint(tmp_path, monkeypatch):
    trainer = make(tmp_path, random_pairs(64), max_steps=8)
    monkeypatch.setattr(OrpoTrainer, "_pair_table", _break_pairs(lambda index: True))
    with pytest.warns(UserWarning):
        trained(trainer)
    assert trainer.step == 3 and "learning_rate" in trainer.stop_reason
    assert [c.name for c in checkpoints.complete(tmp_path)] == ["checkpoint-3"]


def test_held_out_table_is_in_order_and_averages_to_the_evaluation(tmp_path):
    pairs, rows = random_pairs(20), []
    trainer = make(tmp_path, pairs[:8], rows=rows, eval_pairs=pairs[8:], tokens_per_batch=64)
    table = trainer.pair_tables(pairs[8:])
    alone = torch.cat([trainer.pair_tables([p]) for p in pairs[8:]])
    torch.testing.assert_close(table, alone, rtol=1e-5, atol=1e-5)
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(
        table[:, TERMS.index("accuracy")].mean().item()
    )
    assert rows[-1]["step"] == 0 and "eval_log_odds_ratio" in rows[-1]


def test_metrics_are_token_exact_for_the_nll_and_pair_exact_for_the_rest():
    sums = dict.fromkeys(TERMS, 0.0) | dict(nll=30.0, nll_tokens=20.0, or_loss=4.0, accuracy=1.0, pairs=2.0)
    row = metrics(list(sums.values()), 0.5)
    assert row["nll"] == 1.5 and row["or_loss"] == 2.0 and row["accuracy"] == 0.5 and row["loss"] == 2.5


def test_dpo_starts_at_ln_2_and_its_reference_is_the_model_without_its_adapter(tmp_path):
    rows, pairs = [], random_pairs(8)
    trainer = make(tmp_path, pairs, rows=rows, objective="dpo", max_steps=12, lr_schedule="constant")
    trained(trainer)
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and rows[-1]["loss"] < 0.6
    with adapters_off(trainer.model):
        table = trainer.pair_tables([pairs[0]])[0]
    summed = table[TERMS.index("logp_chosen")] * len(pairs[0].chosen)
    assert trainer.reference.sums[pairs[0].index][0].item() == pytest.approx(summed.item(), rel=1e-5)


def test_dpo_under_full_tuning_keeps_the_reference_of_the_untrained_model(tmp_path):
    rows, pairs = [], random_pairs(8)
    trainer = make(
        tmp_path, pairs, rows=rows, objective="dpo", method="full", max_steps=6, learning_rate=1e-3
    )
    trainer.reference.remember(pairs)
    trained(trainer)
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and rows[-1]["loss"] < 0.693


def test_gradients_through_4_bit_weights_are_those_of_the_weights_they_stand_for(tmp_path):
    """Also after an evaluation: the trainer's own, on construction, is one."""
    from bitsandbytes.functional import dequantize_4bit

    config = Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    four_bit = load_base(str(tmp_path), dtype=torch.float32, device="cpu", four_bit=True)
    plain = load_base(str(tmp_path), dtype=torch.float32, device="cpu")
    for name, parameter in four_bit.named_parameters():
        if hasattr(parameter, "quant_state"):
            plain.get_parameter(name).data = dequantize_4bit(parameter.data, parameter.quant_state)
    found = []
    for model in (four_bit, plain):
        trainer = make(tmp_path, random_pairs(4), model=model)
        assert trainer.scorer.rung == "shared"
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # zeros would let nothing through to the adapter's other half
                parameter.data.fill_(0.01)
        found.append(gradients(trainer, random_pairs(4)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and relative(found[0][1], found[1][1]) < 1e-4


# TRL 1.16's ORPOTrainer on the same token ids, where it is installed.


def trl_loss_and_gradients(model, pairs, beta, folder):
    orpo = pytest.importorskip("trl.experimental.orpo")
    width = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)

    def padded(side):
        ids, labels, mask = [], [], []
        for p in pairs:
            row = [*p.prompt, *getattr(p, side)]
            rest = width - len(row)
            ids.append(row + [0] * rest)
            labels.append([-100] * len(p.prompt) + list(getattr(p, side)) + [-100] * rest)
            mask.append([1] * len(row) + [0] * rest)
        return {
            f"{side}_input_ids": torch.tensor(ids),
            f"{side}_labels": torch.tensor(labels),
            f"{side}_attention_mask": torch.tensor(mask),
        }

    config = orpo.ORPOConfig(
        str(folder), beta=beta, bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False
    )
    fake = orpo.ORPOTrainer.__new__(orpo.ORPOTrainer)
    fake.args, fake.beta, fake.model, fake.is_encoder_decoder = config, beta, model, False
    fake.aux_loss_enabled, fake.padding_value, fake._peft_has_been_casted_to_bf16 = False, 0, False
    fake.pad_token_id, fake.label_pad_token_id = 0, -100
    fake.accelerator = type(
        "A", (), {"device": torch.device("cpu"), "gather_for_metrics": staticmethod(lambda x: x)}
    )()
    model.zero_grad()
    loss, _ = fake.get_batch_loss_metrics(model, padded("chosen") | padded("rejected"), train_eval="train")
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_loss_and_every_gradient_equal_trl_on_the_same_tokens(tmp_path, name):
    pairs = random_pairs(6, longest=20)
    trainer = make(
        tmp_path, pairs, model=tiny_model(name), method="full", nll_over="prompt+answer", or_weight=0.3
    )
    loss, grads = gradients(trainer, pairs)
    true_loss, true = trl_loss_and_gradients(tiny_model(name), pairs, 0.3, tmp_path)
    assert loss == pytest.approx(true_loss, rel=1e-5)
    assert relative(grads, true) < 1e-5
    for parameter in true:
        assert (grads[parameter] - true[parameter]).abs().max() < 1e-5 * max(
            1.0, true[parameter].abs().max()
        ), parameter


def trl_dpo_loss_and_gradients(model, reference, pairs, beta, folder):
    """What TRL's DPOTrainer computes from the token log-probabilities of `model` and `reference`, each pair
    in two padded rows."""
    trl = pytest.importorskip("trl")
    rows = [(p.prompt, getattr(p, side)) for side in ("chosen", "rejected") for p in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, scored, seen = torch.zeros(3, len(rows), width, dtype=torch.long)
    for k, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[k, :end], scored[k, len(prompt) : end], seen[k, :end] = torch.tensor([*prompt, *answer]), 1, 1

    def outputs_of(model):
        def forward(input_ids, attention_mask, labels, **_):
            logps = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].log_softmax(-1)
            logps = logps.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0].where(labels[:, 1:] >= 0, 0.0)
            nothing = torch.zeros_like(logps)
            return types.SimpleNamespace(
                log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
            )

        return forward

    config = trl.DPOConfig(
        str(folder), beta=beta, bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False
    )
    same = staticmethod(lambda x: x)
    fake = trl.DPOTrainer.__new__(trl.DPOTrainer)
    vars(fake).update(
        args=config,
        beta=beta,
        model=model,
        ref_model=outputs_of(reference),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        use_weighting=False,
        accelerator=type(
            "A", (), {"device": torch.device("cpu"), "gather_for_metrics": same, "gather": same}
        )(),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    model.train().zero_grad()
    loss = fake._compute_loss(
        outputs_of(model), {"input_ids": ids, "attention_mask": seen, "completion_mask": scored}, False
    )
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_dpo_loss_and_every_gradient_equal_trl_on_the_same_tokens(tmp_path):
    pairs = random_pairs(6, longest=20)
    trainer = make(tmp_path, pairs, method="full", objective="dpo", dpo_beta=0.3)
    trainer.reference.remember(pairs)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():  # away from the reference, where every loss is ln 2
            parameter.add_(torch.randn_like(parameter) * 0.05)
    loss, grads = gradients(trainer, pairs)
    moved = tiny_model("llama")
    moved.load_state_dict(trainer.model.state_dict())
    true_loss, true = trl_dpo_loss_and_gradients(moved, tiny_model("llama"), pairs, 0.3, tmp_path)
    assert abs(loss - 0.693) > 0.01 and loss == pytest.approx(true_loss, rel=1e-5)
    assert grads.keys() == true.keys() and relative(grads, true) < 1e-5


def test_the_or_beta_of_the_settings_is_trained_and_logged(tmp_path):
    pairs, found = random_pairs(4, longest=20), {}
    for beta in (1.0, 3.0):
        trainer = make(tmp_path, pairs, method="full", or_beta=beta, or_weight=1.0)
        table = dict(zip(TERMS, trainer.pair_tables(pairs).T, strict=True))
        ratio = table["log_odds_chosen"] - table["log_odds_rejected"]
        torch.testing.assert_close(table["or_loss"], torch.nn.functional.softplus(-beta * ratio))
        found[beta] = gradients(trainer, pairs)[1]
    assert relative(found[3.0], found[1.0]) > 0.01


# Liger, by a stand-in for its 0.8.5 that replaces the same forwards.


@pytest.fixture
def liger(monkeypatch):
    """Counts the MLPs computed by "Liger"."""
    calls = []

    def fused(module, x):
        calls.append(1)
        return module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))

    def whole(self, *args, **kwargs):  # with its own loss, which knows no pairs
        return type(self).forward(self, *args, **kwargs)

    def apply(model, fused_linear_cross_entropy=True, cross_entropy=False):
        if fused_linear_cross_entropy or cross_entropy:
            model.forward = types.MethodType(whole, model)
        for layer in model.model.layers:
            layer.mlp.forward = types.MethodType(fused, layer.mlp)

    package = types.ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    for place in ("lazyorpo_lib.model", "transformers.integrations.liger", "transformers.training_args"):
        monkeypatch.setattr(f"{place}.is_liger_kernel_available", lambda *args: True, raising=False)
    return calls


@pytest.mark.parametrize("method", ["lora", "full"])
def test_ligers_layers_are_in_the_model_when_its_layout_is_tried_and_train_the_same(tmp_path, liger, method):
    results, base = [], tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    for wanted in (False, True):
        settings = Settings(base_model=str(base), liger_kernel=wanted, **SETTINGS | {"method": method})
        model = load_for_training(settings, method=method, dtype=torch.float32, device="cpu")
        trainer = make(tmp_path, random_pairs(16), model=model, rows=(rows := []), method=method)
        assert trainer.scorer.rung == "shared" and bool(liger) == wanted, (
            "the test of the layout ran through them"
        )
        trained(trainer)
        results.append([row["loss"] for row in rows])
    assert results[0] == pytest.approx(results[1], rel=1e-5) and len(results[1]) == 4


def test_liger_that_is_not_there_is_one_sentence():
    with pytest.raises(
        UserError, match="it is not installed: pip install liger-kernel, or set liger_kernel=false"
    ):
        check_liger(Settings(liger_kernel=True), Machine("cuda", "T4", 14.7))
    check_liger(Settings(), Machine("cpu", "CPU", 8.0))


def test_ligers_layers_are_refused_where_there_is_no_gpu_for_them(monkeypatch):
    monkeypatch.setattr("lazyorpo_lib.model.is_liger_kernel_available", lambda: True)
    check_liger(Settings(liger_kernel=True), Machine("cuda", "T4", 14.7))
    with pytest.raises(UserError, match="need a whole model on a CUDA GPU"):
        check_liger(Settings(liger_kernel=True), Machine("cpu", "CPU", 8.0))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="without FSDP"):
        check_liger(Settings(liger_kernel=True), Machine("cuda", "T4", 14.7))
