"""The stages of one run, from settings to a finished folder.

`Run` holds them in the order in which the notebook shows them; `execute` goes through all. It decides what is
computed and where it is written; the parts do the computing.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from accelerate.utils import broadcast_object_list

from . import __version__, drive, folder, kinds, marker, model
from .errors import UserError, explain_model, say
from .fast.layouts import PairScorer
from .machine import check_apple, memory_gib, pick_precision, this_machine
from .orpo import best, checkpoints, data
from .orpo.encoding import PairFile, Subset, check_model, encode_rows, prepare_tokenizer
from .orpo.processes import by_first, check_tracker, make_accelerator
from .orpo.trainer import OrpoTrainer
from .plan import planner
from .results import benchmarks, card, evaluate, held_out, live, reading, share, words
from .results.summary import Spent, about_training, data_report, settings_record, summarise
from .rows.candidates import candidates
from .rows.dataset import open_rows
from .rows.template import encoder_of
from .session import Stop, Stopped, pod_stopper, progress_bar, stop_pod
from .settings import Settings, settle
from .stages import Staged, stage


class Run(Staged):
    """One run and its folder. `settings`, `sources`: from `settings.resolve`; `show`: how a text is shown."""

    MAKES = {
        "open": ("machine", "dtype", "finished", "record"),
        "load_pairs": ("tokenizer", "encoder", "report", "train_pairs", "eval_pairs", "texts", "style"),
        "load_model": ("model", "trainer", "plan", "method"),
        "train": ("plot", "spent", "stopped", "interrupted"),
        "finish": (),
    }

    def __init__(self, settings: Settings, sources: dict[str, str], *, show: Callable[[str], None] = say):
        self.given, self.settings, self.sources = settings, settings, sources
        self.main = int(os.environ.get("RANK", 0)) == 0  # of several processes the first one writes and shows
        self.show = show if self.main else lambda text: None
        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"  # by accelerate launch
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.folder, self.drive, self.began = folder.folder_of(settings), None, None
        cost = dict(max_cost=settings.max_cost, price=settings.price_per_hour)
        self.stop = Stop(self.folder / "STOP", settings.max_minutes, several=self.world > 1, **cost)

    def begin_stage(self) -> None:
        """Start the clock, and hold the folder, unless the run is finished and only looked at."""
        self.began = self.began or time.monotonic()
        if self.main and "record" in vars(self) and not self.finished and folder.claim(self.folder):
            self.finished = folder.is_finished(self.folder)  # by somebody who had it meanwhile

    @stage
    def open(self) -> None:
        """Look at the machine, take the folder, settle what `auto` means; UserError if one cannot be had."""
        settings, self.machine = self.given, this_machine()
        check_apple(settings, self.machine)
        model.check_liger(settings, self.machine)
        check_tracker(settings.report_to)
        benchmarks.check(settings)
        if settings.on_finish == "stop-pod" and (why := pod_stopper()[1]):
            self.show(why)
        if self.main:
            folder.keep_base_apart(settings.base_model, self.folder)
            known = [f"{checkpoint.name}/" for checkpoint in checkpoints.numbered(self.folder)]
            marker.take(self.folder, "run", *folder.FILES, *known)
            folder.claim(self.folder)
            marker.remove(self.stop.file)  # that an earlier run did not see
            self.drive = drive.drive_folder(self.folder.name) if settings.save_to == "drive" else None
        if self.drive and not (checkpoints.complete(self.folder) or drive.mirror(self.drive, self.folder)):
            self.drive = None  # what an earlier session left there is not written over by less
        begun = folder.is_begun(self.folder, settings)
        self.record = settings_record(self, folder.read_json(self.folder / "settings.json"), begun=begun)
        self.settings = dataclasses.replace(settings, **self.record["chosen"])
        self._take(*settle(self.settings, gpu_gib=self.machine.gpu_gib))
        try:
            self.dtype, why = pick_precision(self.settings.precision, self.machine)
        except UserError:
            if settings.precision != "auto":
                raise
            # Begun in bfloat16, which this GPU does not have; weights are in float32 either way.
            self.dtype, why = pick_precision("auto", self.machine)
        self.finished = folder.is_finished(self.folder)
        if self.record["version"] != __version__:
            self.show(f"Begun with version {self.record['version']} of the kit; this is {__version__}.")
        if self.finished:  # its record stays as it is
            folder.release(self.folder)
        else:
            self._write("settings.json", kinds.look_up(self.settings, self.record, self.show))
        self.show(f"{self.machine.name}, {self.machine.memory_gib:.1f} GiB. {why}.\nFolder: {self.folder}")

    def _take(self, settings: Settings, why: dict[str, str]) -> None:
        """Take what was decided; settings.json tells it, so that whoever goes on takes the same."""
        changed = {n: value for n, value in vars(settings).items() if value != getattr(self.settings, n)}
        self.settings, self.record["sources"] = settings, self.record["sources"] | why
        self.record["chosen"] = self.record["chosen"] | changed

    def _write(self, name: str, content: dict) -> None:
        if self.main:
            marker.write_atomically(self.folder / name, json.dumps(content, indent=1).encode())

    @stage
    def load_pairs(self) -> data.Report | None:
        """Read, clean, encode and split the dataset; writes data_report.json and dropped.jsonl."""
        if "record" not in vars(self):
            self.open()
        try:
            config = kinds.load_config(self.settings.base_model)
            self._take(*settle(self.settings, positions=kinds.positions_of(config)))
            s = self.settings
            kinds.check_method(config, s.method, s.base_model)
            self.tokenizer = model.load_tokenizer(s.base_model)
            for note in prepare_tokenizer(self.tokenizer):
                self.show(note[0].upper() + note[1:] + ".")
            self.encoder = encoder_of(self.tokenizer, s, clock=self.record["clock"])
            several = self.stop.several and not self.finished
            vars(self).update(by_first(self._read_pairs, self.folder / ".pairs", several=several))
            split = data.about_split(self.train_pairs, self.eval_pairs)
            self.show(f"{str(self.report).capitalize()}. {split}")
            for note in filter(None, [words.said(self.style), *self.report.notes()]):
                self.show(note)
            return self.report
        except UserError as error:
            if not self.finished:
                raise
            self.show(f"{error} The run is finished, and its results follow all the same.")

    def _read_pairs(self) -> dict:
        """Make what becomes of the dataset, by name, in a form for other processes."""
        s, bag, anew = self.settings, words.BagOfWords(), self.main and not self.finished
        pairs = PairFile(self.folder / ".pairs" if self.stop.several and anew else None)
        rows = candidates(open_rows(s.dataset, max_rows=s.max_pairs), s.columns)
        older = folder.read_json(self.folder / "data_report.json").get("digest")
        file = marker.writing(self.folder / "dropped.jsonl") if anew else open(os.devnull, "wb")
        with file as dropped:

            def drop(row: dict) -> None:
                dropped.write(json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")

            def keep(bar):
                for pair, encoded in encoded_pairs:
                    bar.update()
                    pairs.append(encoded)
                    bag.add(pair.chosen, pair.rejected)
                    yield pair

            encoded_pairs, report = encode_rows(rows, self.encoder, on_drop=drop)
            with progress_bar(None, "pairs", desc="cleaning") as bar:
                train, tested = data.split_held_out(keep(bar), s.eval_pairs, s.seed)
            self.report = dataclasses.replace(report, on_drop=None, digest=report.digest.hexdigest())
            self._keep_to("dataset", s.dataset, older, self.report.digest)
        if not train:
            why = f"No pair of the dataset {s.dataset!r} is left to train on ({self.report})"
            raise UserError(f"{why}: {self.report.way_out()}see {self.folder / 'dropped.jsonl'}.")
        self.train_pairs, self.eval_pairs = Subset(pairs, train), Subset(pairs, tested)
        self.texts = rows.at([p.index for p in self.eval_pairs] or [pairs[0].index])
        self.style = bag.accuracy(train, tested)
        if anew:
            self._write("data_report.json", data_report(self, pairs))
        return {name: vars(self)[name] for name in ("report", "train_pairs", "eval_pairs", "texts", "style")}

    def _keep_to(self, what: str, name: str, older: str | None, now: str) -> None:
        """Say that the run was trained with another dataset or base model; UserError where it would go on."""
        changed = f"The {what} {name!r} is not what it was when the run in {self.folder}"
        if older not in (None, now) and self.finished:
            self.show(f"{changed} was trained: nothing is done with it; for that choose another output_dir.")
        elif older not in (None, now) and checkpoints.complete(self.folder):
            raise UserError(f"{changed} began: choose another output_dir, or bring the old {what} back.")

    @stage
    def load_model(self) -> None:
        """Load the base model and the trainer around it; UserError where it is not what it was at first."""
        if self.finished:
            anew = "Change a setting, or delete its folder, to train anew."
            return self.show(f"This run is finished; its results follow. {anew}")
        model.forget_earlier_run()
        name, begun = self.settings.base_model, bool(checkpoints.complete(self.folder))
        config, lengths = kinds.load_config(name), planner.measured_lengths(self.train_pairs)
        how = dict(dtype=self.dtype, cards=self.world, sharded=self.sharded, begun=begun)
        with explain_model(name):
            plan = planner.make_plan(config, self.settings, self.machine, lengths, **how)
        tried = "\nIt is tried all the same: when memory runs out, batches shrink."
        self.show(f"{plan.line()}.\n{plan.table()}{'' if plan.method.fits else tried}")
        (self.plan,) = broadcast_object_list([plan])  # of several processes all take the first one's
        auto, self.method = self.plan.auto.items(), self.plan.chosen
        taken = {"optimizer": self.plan.method.optimizer, "precision": str(self.dtype).removeprefix("torch.")}
        taken |= {name: value for name, (value, _) in auto}
        why = {name: f"auto: {why}" for name, (_, why) in auto}
        self._take(dataclasses.replace(self.settings, **taken), why)
        s, device = self.settings, self.machine.device
        os.environ["WANDB_DIR"] = str(self.folder)
        accelerator = make_accelerator(s, dtype=self.dtype, device=device, folder=self.folder)
        if device == "cuda":  # FSDP takes each process's part from the CPU: one may not hold the whole
            device = "cpu" if self.sharded else f"cuda:{accelerator.local_process_index}"
        self.model = model.load_for_training(s, method=self.method, dtype=self.dtype, device=device)
        check_model(self.train_pairs.dataset, self.model)
        plan, pairs = self.plan.method, (self.train_pairs, self.eval_pairs)
        how = dict(tokens_per_batch=plan.tokens_per_batch, checkpointed_layers=plan.checkpointed_layers)
        how |= dict(make_scorer=lambda whole: PairScorer(model.causal_lm(whole)), folder=self.folder)
        how |= dict(stop=self.stop, on_row=self._on_row, on_step=self._on_step, on_save=self._mirror)
        self.trainer = OrpoTrainer(self.model, s, *pairs, accelerator=accelerator, **how)
        older, self.record["base"] = self.record.get("base"), kinds.digest_of(name)
        self._keep_to("base model", name, older, self.record["base"])
        self._write("settings.json", self.record)
        self.show(about_training(self))

    @stage
    def train(self) -> None:
        """Evaluate and answer, train with the live picture, evaluate and answer again. Goes on from the
        newest complete checkpoint; after a stop it returns as after an end."""
        if self.finished:
            self.stopped, self.interrupted = "", False
            return live.show_progress(self.folder)
        found, trained = None, 0 < self.trainer.steps <= self.trainer.step  # by an earlier press
        if not trained:  # what an earlier process left behind the checkpoint goes
            found = checkpoints.go_on(self.folder, sharded=self.sharded, main=self.main, show=self.show)
            held_out.forget(self, all_of_it=not found)
            if self.trainer.optimizer and not found:  # it left nothing to go on from
                self.load_model()
        s, trainer, history = self.settings, self.trainer, self.folder / "history.jsonl"
        title = f"{Path(s.base_model).name} on {s.dataset.split('/')[-1]}"
        picture = self.folder / "live.png" if self.main else None
        self.plot = live.LivePlot(picture, title=title, total_steps=trainer.steps)
        for row in folder.read_rows(history):
            self.plot.update(row)
        self.spent, self.began = Spent(self.began, trainer.device, trainer.carried), None
        with model.without_bars(), contextlib.closing(self.plot):
            try:
                if not trained:
                    self._train(found)
                if "after" not in folder.read_json(self.folder / "held_out.json") and not self.stop.hurried:
                    held_out.measure(self, "after")
                benchmarks.measure(self, "after")
                self.plot.results = self.held_out_results() | trainer.best.told()
                complete = 0 < trainer.steps <= trainer.step and not self.stop.hurried
            except Stopped:  # what was trained is in a checkpoint
                complete = False
        self.stopped = trainer.stop_reason or ("" if complete else self.stop.reason)
        self.interrupted = bool(trainer.stop_reason) or (self.stop.asked and not complete)
        if self.stopped:
            self.show(f"Stopped at step {trainer.step}: {self.stopped}. Run again to go on from there.")
        if trainer.best.step:
            self.show(f"Kept: {trainer.best.told()['kept']}.")
        curves = reading.read_curves(folder.read_rows(history), self.plot.results)
        self.show(f"Reading of the curves: {curves}.")

    def _train(self, found: Path | None) -> None:
        """Take the steps that are left; from the first one, where nothing is found to go on from."""
        trainer = self.trainer
        trainer.prepare(found)
        self.spent.earlier = trainer.carried
        if not found:
            held_out.measure(self, "before")
        benchmarks.measure(self, "before")
        self.bar = progress_bar(trainer.steps, "steps", initial=trainer.step, desc="training")
        with self.bar, self.stop.waiting():
            with self.spent.on("training"):
                trainer.train()
            last = self.folder / f"checkpoint-{trainer.step}"
            if trainer.step >= trainer.steps and not marker.is_whole(last, "checkpoint"):
                trainer.save(to_go_on=False)  # before the model is examined, which may fail
            best.take_best(trainer)

    def _on_row(self, row: dict) -> None:
        folder.append_row(self.folder / "history.jsonl", row)
        self.plot.results = self.trainer.best.told()
        self.plot.update(row)

    def _on_step(self, step: int) -> None:
        if step % 10 == 1 or step == self.trainer.steps:
            pairs, memory = step * self.settings.pairs_per_step, memory_gib(self.trainer.device)
            self.bar.set_postfix_str(f"{pairs:,} pairs, {memory:.1f} GiB", refresh=False)
        self.bar.update()
        self.stop.try_to(lambda: held_out.watch(self, step))
        self.trainer.carried = self.spent.totals()

    def _mirror(self) -> None:
        if self.drive:  # training stays on the local disk
            drive.mirror(self.folder, self.drive)

    @stage
    def finish(self) -> dict:
        """Save the model, summary.json and the card; returns the summary."""
        kept = self.folder / "summary.json"
        summary = folder.read_json(kept) if self.finished else self._save(self.stopped)
        anew, self.finished, self.began = not self.finished, summary["finished"], None
        if not self.main:
            return summary
        about = self.folder / "README.md"
        if anew or not about.exists():  # a kill may have come before
            marker.write_atomically(about, card.write_card(self.folder).encode())
        marker.settle(self.folder)
        if self.finished:
            checkpoints.remove(self.folder)
        self._mirror()
        repo = self.settings.hub_repo
        if self.finished and repo not in ("", summary.get("pushed_to")):
            self.show(f"Pushed to {share.push(self.folder, repo)} (private unless it existed).")
            self._write("summary.json", summary | {"pushed_to": repo})
        folder.release(self.folder)  # who only looks at it holds up nobody
        alone = anew and (self.trainer.stop_reason or not self.interrupted)  # else somebody is there
        if alone and self.settings.on_finish == "stop-pod":
            stop_pod(self.show)
        return summary

    def _save(self, stopped: str) -> dict:
        """Write the model, and then the summary that says so."""
        trainer, home, base = self.trainer, self.folder / "model", self.settings.base_model
        if trainer.step:
            weights = trainer.gathered_weights()
            if self.main:
                self.model.generation_config.eos_token_id = held_out.end_ids(self)
                with model.without_bars():
                    model.save_model(self.model, self.tokenizer, home, base_model=base, weights=weights)
                if bad := marker.damaged(home):  # the checkpoint is still there
                    lost = f"{home} does not read back as it was written ({', '.join(bad)})"
                    raise UserError(f"{lost}: the disk fails; mend that, and run again.")
        trainer.close()
        self._write("summary.json", summary := summarise(self, stopped))
        return summary

    def held_out_results(self) -> dict:
        """Say what the held-out pairs show: figures with intervals, the verdict, the demo's habit."""
        kept = folder.read_json(self.folder / "held_out.json")
        return evaluate.held_out_results(kept, self.settings.dataset) | benchmarks.results(kept)

    def answers(self) -> list[dict[str, str]]:
        """List held-out prompts with the answers of the base and of the tuned model."""
        return evaluate.answers_side_by_side(folder.read_json(self.folder / "held_out.json"))


def execute(settings: Settings, sources: dict[str, str], *, show: Callable[[str], None] = say) -> Run:
    """Carry out a whole run, from the first stage to the last."""
    run = Run(settings, sources, show=show)
    for carry_out in (run.open, run.load_pairs, run.load_model, run.train):
        carry_out()
    summary = run.finish()
    run.show(summary.get("verdict", "No held-out figures: eval_pairs is 0, or the run was stopped early."))
    return run
