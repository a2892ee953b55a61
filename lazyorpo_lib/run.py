"""The stages of one run, from settings to a finished folder.

`Run` holds them in the order in which the notebook shows them; `execute` goes through all. It decides what is
computed and where it is written; the parts do the computing.
"""

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object

from . import __version__, model
from . import folder as folders
from .errors import UserError, explain_disk
from .fast.layouts import PairScorer
from .machine import allocated_gib, check_apple, forget_peak_memory, memory_gib, pick_precision, this_machine
from .orpo import checkpoints, data
from .orpo.encoding import Encoder, PairFile, Subset, check_model, encode_rows, prepare_tokenizer
from .orpo.processes import make_accelerator
from .orpo.trainer import OrpoTrainer
from .plan import planner
from .results import card, evaluate, held_out, reading, share
from .results.live import LivePlot, show_progress
from .results.summary import about_training, data_report, summarise
from .results.words import BagOfWords, said
from .session import Stop, Stopped, progress_bar
from .settings import Settings


def _stage(method):
    """A stage of a run, in which a full disk is one sentence."""

    @functools.wraps(method)
    def stage(self):
        with explain_disk(self.folder):
            return method(self)

    return stage


class Run:
    """One run and its folder: `open`, `load_pairs`, `load_model`, `train`, `finish`.

    Args:
        settings, sources: from `settings.resolve`.
        show: how a line of text is shown.
    """

    def __init__(self, settings: Settings, sources: dict[str, str], *, show: Callable[[str], None] = print):
        self.settings, self.sources = settings, sources
        self.main = int(os.environ.get("RANK", 0)) == 0  # of several processes the first one writes and shows
        self.show = show if self.main else lambda text: None
        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"  # by accelerate launch
        self.folder, self.started = folders.folder_of(settings), time.time()
        self.stop = Stop(self.folder / "STOP", settings.max_minutes)
        self.drive, self.record, self.seconds = None, {}, {"training": 0.0, "evaluation": 0.0}
        self.finished, self.stopped, self.interrupted = False, "", False

    def open(self) -> None:
        """Look at the machine, take the folder, and settle what `auto` means there.

        Raises:
            UserError: the folder cannot be written, is in use, or holds a run with other settings; the
                settings ask for what this machine does not have.
        """
        settings = self.settings
        self.machine = this_machine()
        check_apple(settings, self.machine)
        model.check_liger(settings, self.machine)
        if self.main:
            folders.keep_base_apart(settings.base_model, self.folder)
            known = [f"{checkpoint.name}/" for checkpoint in checkpoints.numbered(self.folder)]
            folders.take(self.folder, "run", *folders.FILES, *known)
            folders.claim(self.folder)
            self.drive = folders.drive_folder(self.folder.name) if settings.save_to == "drive" else None
        if self.drive and not checkpoints.complete(self.folder):
            if not folders.mirror(self.drive, self.folder):  # what an earlier session left there
                self.drive = None  # nor is it written to: a copy of less would take its place
        older = folders.read_json(self.folder / "settings.json")
        # What auto chose when the run began holds to its end, also on another kind of machine.
        chosen = older.get("chosen", {}) if folders.is_begun(self.folder, settings) else {}
        self.settings = dataclasses.replace(settings, **chosen)
        try:
            self.dtype, why = pick_precision(self.settings.precision, self.machine)
        except UserError:
            if settings.precision != "auto":
                raise
            # Begun in bfloat16, which this GPU does not have; weights are in float32 either way.
            self.settings = dataclasses.replace(self.settings, precision="auto")
            self.dtype, why = pick_precision("auto", self.machine)
        self.finished = bool(folders.read_json(self.folder / "summary.json").get("finished"))
        self.record = {"version": __version__, "fingerprint": folders.fingerprint(settings)}
        self.record |= {"settings": dataclasses.asdict(settings), "sources": self.sources, "chosen": chosen}
        self.record["clock"] = older.get("clock", self.started)  # what a chat template is told as the time
        self._write("settings.json", self.record)
        self.show(f"{self.machine.name}, {self.machine.memory_gib:.1f} GiB. {why}.\nFolder: {self.folder}")

    def _write(self, name: str, content: dict) -> None:
        if self.main:
            with explain_disk(self.folder):
                folders.write_atomically(self.folder / name, json.dumps(content, indent=1).encode())

    def _read(self, name: str) -> dict:
        return folders.read_json(self.folder / name)

    # Pairs.

    @_stage
    def load_pairs(self) -> data.Report:
        """Read, clean, encode and split the dataset; writes data_report.json and dropped.jsonl."""
        if not self.record:
            self.open()
        s, pairs, words = self.settings, PairFile(), BagOfWords()
        self.tokenizer = model.load_tokenizer(s.base_model)
        for note in prepare_tokenizer(self.tokenizer):
            self.show(note[0].upper() + note[1:] + ".")
        limits = dict(max_prompt_tokens=s.max_prompt_tokens, max_tokens=s.max_tokens, overlong=s.overlong)
        self.encoder = Encoder(self.tokenizer, **limits, clock=self.record["clock"])
        rows = data.open_rows(s.dataset, max_rows=s.max_pairs)
        draft = self.folder / "dropped.jsonl.tmp" if self.main else Path(os.devnull)
        bar = progress_bar(None, "pairs", desc="cleaning")
        with open(draft, "w", encoding="utf-8") as dropped, bar:

            def write(row: dict) -> None:
                dropped.write(json.dumps(row, ensure_ascii=False) + "\n")

            def kept():
                for pair, encoded in encoded_pairs:
                    bar.update()
                    pairs.append(encoded)
                    words.add(pair.chosen, pair.rejected)
                    yield pair

            encoded_pairs, self.report = encode_rows(rows, self.encoder, columns=s.columns, on_drop=write)
            train, tested = data.split_held_out(kept(), s.eval_pairs, s.seed)
        if self.main:
            draft.replace(self.folder / "dropped.jsonl")
        if not train:
            raise UserError(
                f"No pair of the dataset {s.dataset!r} is left to train on ({self.report}): "
                f"{self.report.way_out()}see {self.folder / 'dropped.jsonl'}."
            )
        self.train_pairs, self.eval_pairs = Subset(pairs, train), Subset(pairs, tested)
        self.texts = data.pairs_at(rows, [p.index for p in self.eval_pairs] or [pairs[0].index], s.columns)
        self.style, digest = words.accuracy(train, tested), self.report.digest.hexdigest()
        self._check_data(digest)
        self._write("data_report.json", data_report(self, pairs, digest))
        self.show(f"{str(self.report).capitalize()}. {data.about_split(train, tested)}")
        self.show("\n".join(filter(None, [said(self.style), *self.report.notes()])))
        return self.report

    def _check_data(self, digest: str) -> None:
        """Refuse to go on with other pairs than the run began with."""
        older = self._read("data_report.json").get("digest", digest)
        if older != digest and checkpoints.complete(self.folder):
            raise UserError(
                f"The dataset {self.settings.dataset!r} is not what it was when the run in {self.folder} "
                "began: choose another output_dir, or bring the old dataset back."
            )

    # Model.

    @_stage
    def load_model(self) -> None:
        """Load the base model with what is to be trained, and the trainer around it."""
        if self.finished:
            self.show(
                "This run is finished; its results follow. Change a setting, or delete its folder, to train "
                "anew."
            )
            return
        model.forget_earlier_run()
        forget_peak_memory()
        # Of several processes all take the first one's plan.
        (self.plan,) = broadcast_object_list([self._plan()])
        s = self.settings = dataclasses.replace(self.settings, optimizer=self.plan.optimizer)
        if not all(gather_object([(self.folder / "settings.json").is_file()])):  # the first process wrote it
            raise UserError(
                f"{self.folder} is not on every machine the folder that the first process writes: give an "
                "output_dir that all of them see."
            )
        os.environ["WANDB_DIR"] = str(self.folder)
        accelerator = make_accelerator(s, dtype=self.dtype, device=self.machine.device, folder=self.folder)
        self.method = self.plan.chosen
        chosen = {"method": self.method, "precision": str(self.dtype).removeprefix("torch.")}
        if s.optimizer != self.record["settings"]["optimizer"]:
            chosen["optimizer"] = s.optimizer
        self._write("settings.json", self.record | {"chosen": chosen})
        device = self.machine.device
        if device == "cuda":  # FSDP takes each process's part from the CPU: one may not hold the whole
            device = "cpu" if self.sharded else f"cuda:{accelerator.local_process_index}"
        self.model = model.load_for_training(s, method=self.method, dtype=self.dtype, device=device)
        check_model(self.train_pairs.dataset, self.model)
        self.trainer = OrpoTrainer(
            self.model,
            s,
            self.train_pairs,
            self.eval_pairs,
            accelerator=accelerator,
            folder=self.folder,
            tokens_per_batch=self.plan.method.tokens_per_batch,
            checkpointed_layers=self.plan.method.checkpointed_layers,
            make_scorer=lambda whole: PairScorer(model.causal_lm(whole)),
            stop=self.stop,
            on_row=self._on_row,
            on_step=self._on_step,
            on_save=self._mirror,
        )
        self.show(about_training(self))

    def _plan(self) -> planner.Plan:
        plan = planner.make_plan(
            model.load_config(self.settings.base_model),
            self.settings,
            self.machine,
            planner.measured_lengths(self.train_pairs),
            dtype=self.dtype,
            cards=int(os.environ["WORLD_SIZE"]) if self.sharded else 1,
            begun=bool(checkpoints.complete(self.folder)),
        )
        self.show(f"{plan.line()}.\n{plan.table()}")
        if not plan.method.fits:
            self.show("It is tried all the same: when memory runs out, batches shrink.")
        return plan

    # Training.

    @_stage
    def train(self) -> None:
        """Evaluate and answer, train with the live picture, evaluate and answer again. Goes on from the
        newest complete checkpoint; after a stop it returns as after an end."""
        if self.finished or self.trainer.step >= self.trainer.steps:
            if not self.finished and "after" not in self._read("held_out.json"):
                held_out.measure(self, "after")  # which an interrupt had ended
            show_progress(self.folder)
            return
        found = self._clear_up()
        if self.trainer.optimizer and not found:  # it was begun, and left nothing to go on from
            self.load_model()
        s, trainer = self.settings, self.trainer
        title = f"{Path(s.base_model).name} on {s.dataset.split('/')[-1]}"
        picture = self.folder / "live.png" if self.main else None
        self.plot = LivePlot(picture, title=title, total_steps=trainer.steps)
        for row in folders.read_rows(self.folder / "history.jsonl"):
            self.plot.update(row)
        self.peak_before, self.peak_training, self.peak_allocated = 0.0, 0.0, None
        with self.stop.listening(), model.without_bars(), contextlib.suppress(Stopped):
            try:
                trainer.prepare(found)
                if not found:
                    held_out.measure(self, "before")
                self._train()
                if not self.stop.hurried or trainer.step >= trainer.steps:
                    held_out.measure(self, "after")
            finally:
                self.plot.close()
        done = 0 < trainer.steps <= trainer.step
        self.stopped = trainer.stop_reason or ("" if done else self.stop.reason)
        self.interrupted = bool(trainer.stop_reason) or (self.stop.asked and not done)
        if self.stopped:
            self.show(f"Stopped at step {trainer.step}: {self.stopped}. Run again to go on from there.")
        rows = folders.read_rows(self.folder / "history.jsonl")
        self.show(f"Reading of the curves: {reading.read_curves(rows)}.")

    def _clear_up(self) -> Path | None:
        """The checkpoint to go on from, with what an earlier process left behind it taken away."""
        found = checkpoints.complete(self.folder)
        if found and checkpoints.is_sharded(found[-1]) != self.sharded:
            raise UserError(
                f"{found[-1]} was written {'without' if self.sharded else 'with'} FSDP: go on with the "
                "accelerate config that the run began with, or choose another output_dir."
            )
        last = checkpoints.step_of(found[-1]) if found else -1
        if self.main:
            for name in ("history.jsonl", "watched.jsonl"):
                folders.truncate_after(self.folder / name, last)
            folders.remove(self.folder / ".saving")
        if found:
            self.show(f"Going on from step {last}.")
            kept = self._read("held_out.json")
            self._write("held_out.json", {name: part for name, part in kept.items() if name != "after"})
        return found[-1] if found else None

    def _train(self) -> None:
        trainer, began = self.trainer, time.monotonic()
        self.peak_before = memory_gib(trainer.device)
        forget_peak_memory()
        self.bar = progress_bar(trainer.steps, "steps", initial=trainer.step, desc="training")
        with self.bar:
            trainer.train()
        self.seconds["training"] = time.monotonic() - began
        self.peak_training, self.peak_allocated = memory_gib(trainer.device), allocated_gib(trainer.device)

    def _on_row(self, row: dict) -> None:
        folders.append_row(self.folder / "history.jsonl", row)
        self.plot.update(row)

    def _on_step(self, step: int) -> None:
        if step % 10 == 1 or step == self.trainer.steps:
            pairs, memory = step * self.settings.pairs_per_step, memory_gib(self.trainer.device)
            self.bar.set_postfix_str(f"{pairs:,} pairs, {memory:.1f} GiB", refresh=False)
        self.bar.update()
        held_out.watch(self, step)

    def _mirror(self) -> None:
        """Copy what is complete to Google Drive, where that was chosen; training stays on the local disk."""
        if self.drive:
            folders.mirror(self.folder, self.drive)

    # The end.

    @_stage
    def finish(self) -> dict:
        """Save the model, summary.json and the card; returns the summary."""
        if self.finished:
            self._wrap_up()  # a kill may have come before
            return self._read("summary.json")
        trainer = self.trainer
        if self.main:
            folders.remove(self.folder / "README.md")  # of an earlier stop
        if trainer.step:
            weights = trainer.gathered_weights()
            if self.main:
                self.model.generation_config.eos_token_id = held_out.end_ids(self)
                place = dict(folder=self.folder / "model", base_model=self.settings.base_model)
                with model.without_bars():
                    model.save_model(self.model, self.tokenizer, weights=weights, **place)
        trainer.close()
        summary = summarise(self)
        self._write("summary.json", summary)
        self.finished = not self.stopped
        self._wrap_up()
        if self.main and self.finished and self.settings.hub_repo:
            address = share.push(self.folder, self.settings.hub_repo)
            self.show(f"Pushed to {address} (private unless it existed).")
        return summary

    def _wrap_up(self) -> None:
        if not self.main:
            return
        if not (self.folder / "README.md").exists():
            folders.write_atomically(self.folder / "README.md", card.write_card(self.folder).encode())
        if self.finished:
            checkpoints.remove(self.folder)
        self._mirror()

    def held_out_results(self) -> dict:
        """Say what the held-out pairs show: figures with intervals, the verdict, the demo's habit."""
        return evaluate.held_out_results(self._read("held_out.json"), self.settings.dataset)

    def answers(self) -> list[dict[str, str]]:
        """List held-out prompts with the answers of the base and of the tuned model."""
        return evaluate.answers_side_by_side(self._read("held_out.json"))


def execute(settings: Settings, sources: dict[str, str], *, show: Callable[[str], None] = print) -> Run:
    """Carry out a whole run, from the first stage to the last."""
    run = Run(settings, sources, show=show)
    for stage in (run.open, run.load_pairs, run.load_model, run.train):
        stage()
    summary = run.finish()
    run.show(summary.get("verdict", "No held-out figures: eval_pairs is 0, or the run was stopped early."))
    return run
