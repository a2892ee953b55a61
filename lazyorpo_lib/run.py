"""One run, from settings to a finished folder. Notebook and command line both call this.

`Run` holds the stages in the order in which the notebook shows them; `execute` goes through all of them. It decides what is
computed and where it is written; the parts do the computing.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from transformers.utils import logging as transformers_logging

from . import __version__, model
from .errors import UserError, explain_disk
from .fast import attention
from .folder import (
    FILES,
    NOT_THE_RESULT,
    append_row,
    claim,
    drive_folder,
    fingerprint,
    folder_of,
    keep_base_apart,
    mirror,
    read_json,
    read_rows,
    remove,
    take,
    truncate_after,
    write_atomically,
)
from .machine import allocated_gib, check_apple, forget_peak_memory, memory_gib, pick_precision, this_machine
from .orpo import checkpoints, data, trainer
from .orpo.encoding import Encoder, PairFile, Subset, prepare_tokenizer
from .plan import planner
from .results import card, evaluate, reading, share
from .results.live import LivePlot, show_progress
from .session import On, Progress, Stop, Stopped, duration, progress_bar
from .settings import FIELDS, Settings

FIRST_STEPS = 10  # real steps that tell how long the rest will take


def _stage(method):
    """A stage of a run, in which a full disk is one sentence."""

    @functools.wraps(method)
    def stage(self):
        with explain_disk(self.folder):
            return method(self)

    return stage


class Run:
    """One run and its folder.

    Args:
        settings, sources: from `settings.resolve`.
        show: how a line of text is shown.

    Raises:
        UserError: the folder cannot be written, is in use, or holds a run with other settings.
    """

    def __init__(self, settings: Settings, sources: dict[str, str], *, show: Callable[[str], None] = print):
        self.settings, self.sources = settings, sources
        self.main = int(os.environ.get("RANK", 0)) == 0  # of several processes the first one writes and shows
        self.show = show if self.main else lambda text: None
        self.fsdp = (
            os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        )  # as accelerate launch says it
        self.machine = this_machine()
        check_apple(settings, self.machine)
        model.check_liger(settings, self.machine)
        self.folder, self.started = folder_of(settings), time.time()
        if self.main:
            keep_base_apart(settings.base_model, self.folder)
            take(self.folder, "run", *FILES, *(f"{c.name}/" for c in checkpoints.numbered(self.folder)))
            claim(self.folder)
        self.stop = Stop(self.folder / "STOP", settings.max_minutes)
        self.fingerprint = fingerprint(settings)
        self.drive = drive_folder(self.folder.name) if settings.save_to == "drive" and self.main else None
        if self.drive and not checkpoints.complete(self.folder):
            mirror(self.drive, self.folder)  # what an earlier session left there
        older = read_json(self.folder / "settings.json")
        # What auto chose when the run began holds to its end, also where it goes on on another kind of machine.
        chosen = older.get("chosen", {}) if self._agree_with(older) else {}
        self.settings = dataclasses.replace(settings, **chosen)
        try:
            self.dtype, self.precision_reason = pick_precision(self.settings.precision, self.machine)
        except UserError:  # begun in bfloat16 by auto, going on on a GPU that has none: what is trained is in float32 either way
            if settings.precision != "auto":
                raise
            self.settings = dataclasses.replace(self.settings, precision="auto")
            self.dtype, self.precision_reason = pick_precision("auto", self.machine)
        self.interrupted, self.foreseen_minutes = False, None
        self.looked_seconds = self.evaluated_seconds = 0.0
        self.finished = bool(read_json(self.folder / "summary.json").get("finished"))
        self.record = {
            "version": __version__, "fingerprint": self.fingerprint, "settings": dataclasses.asdict(settings),
            "sources": sources, "chosen": chosen,
        }  # fmt: skip
        self._write("settings.json", self.record)
        self.show(
            f"{self.machine.name}, {self.machine.memory_gib:.1f} GiB. {self.precision_reason}.\nFolder: {self.folder}"
        )

    def _write(self, name: str, content) -> None:
        if self.main:
            with explain_disk(self.folder):
                write_atomically(self.folder / name, json.dumps(content, indent=1).encode())

    def _agree_with(self, older: dict) -> bool:
        """Whether the folder holds this run, begun; an error where it holds another one."""
        begun = any((self.folder / name).exists() for name in ("history.jsonl", "summary.json"))
        if not (older and begun):
            return False
        if older["fingerprint"] != self.fingerprint:
            now = dataclasses.asdict(self.settings)
            other = [
                f"{name} was {older['settings'].get(name)!r}, is {now[name]!r}"
                for name in FIELDS
                if name not in NOT_THE_RESULT and older["settings"].get(name) != now[name]
            ]
            raise UserError(
                f"{self.folder} holds a run with other settings ({'; '.join(other) or 'another version of the kit'}): "
                "choose another output_dir, or delete that folder."
            )
        if self.settings.resume == "never":
            raise UserError(
                f"{self.folder} holds a run already and resume is never: choose another output_dir, or resume=auto."
            )
        return True

    # Pairs.

    @_stage
    def load_pairs(self) -> data.Report:
        """Read, clean, encode and split the dataset; writes data_report.json and dropped.jsonl."""
        s = self.settings
        self.tokenizer = model.load_tokenizer(s.base_model)
        for note in prepare_tokenizer(self.tokenizer):
            self.show(note[0].upper() + note[1:] + ".")
        self.encoder = Encoder(
            self.tokenizer,
            max_prompt_tokens=s.max_prompt_tokens,
            max_tokens=s.max_tokens,
            overlong=s.overlong,
        )
        rows = data.open_rows(s.dataset, max_rows=s.max_pairs)
        pairs, digest = PairFile(), hashlib.sha256()
        draft = self.folder / "dropped.jsonl.tmp" if self.main else Path(os.devnull)
        with (
            open(draft, "w", encoding="utf-8") as dropped,
            progress_bar(None, "pairs", desc="cleaning") as bar,
        ):
            cleaned, self.report = data.clean(
                rows,
                columns=s.columns,
                on_drop=lambda row: dropped.write(json.dumps(row, ensure_ascii=False) + "\n"),
            )

            def kept():
                for pair, encoded in self.encoder.encode(cleaned):
                    bar.update()
                    if isinstance(encoded, str):
                        self.report.drop(pair.index, encoded, pair)
                    else:
                        pairs.append(encoded)
                        digest.update(repr(encoded).encode())
                        yield pair

            train, held_out = data.split_held_out(kept(), s.eval_pairs, s.seed)
        if self.main:
            draft.replace(self.folder / "dropped.jsonl")
        if not train:
            raise UserError(
                f"No pair of the dataset {s.dataset!r} is left to train on ({self.report}): see {self.folder / 'dropped.jsonl'}."
            )
        self.train_pairs, self.eval_pairs = Subset(pairs, train), Subset(pairs, held_out)
        self.texts = self._texts_of(rows, [p.index for p in self.eval_pairs] or [pairs[0].index])
        self._report_tokens(pairs, digest.hexdigest())
        self.show(f"{str(self.report).capitalize()}. {len(train):,} to train on, {len(held_out):,} held out.")
        return self.report

    def _texts_of(self, rows, indexes: list[int]) -> list[data.Pair]:
        """The held-out pairs as text. They are read once more, for which they are is known only at the end."""
        columns, wanted, found = data.parse_columns(self.settings.columns), set(indexes), {}
        for index, row in rows:
            if index in wanted:
                found[index] = data.to_pair(index, row, columns)
                if len(found) == len(wanted):
                    break
        return [found[i] for i in indexes]

    def _report_tokens(self, pairs: PairFile, digest: str) -> None:
        older = read_json(self.folder / "data_report.json")
        if older and older.get("digest") != digest and checkpoints.complete(self.folder):
            raise UserError(
                f"The dataset {self.settings.dataset!r} is not what it was when the run in {self.folder} began: choose another "
                "output_dir, or bring the old dataset back."
            )
        lengths = pairs.lengths_of_sides()
        tokens = {
            side: {
                "mean": float(n.mean()),
                "p50": float(np.median(n)),
                "p95": float(np.quantile(n, 0.95)),
                "max": int(n.max()),
            }
            for side, n in lengths.items()
        }
        figures = {
            "train": len(self.train_pairs),
            "held_out": len(self.eval_pairs),
            "tokens": tokens,
            "digest": digest,
        }
        self._write("data_report.json", self.report.as_dict() | figures)

    # Model.

    @_stage
    def load_model(self) -> None:
        """Load the base model with what is to be trained, and the trainer around it."""
        s = self.settings
        if self.finished:
            self.show(
                "This run is finished; its results follow. Change a setting, or delete its folder, to train anew."
            )
            return
        model.forget_earlier_run()
        forget_peak_memory()
        device = (
            f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            if self.machine.device == "cuda"
            else self.machine.device
        )
        if self.fsdp:
            device = (
                "cpu"  # FSDP takes each process's part from there; the whole may be too large for one GPU
            )
        os.environ["WANDB_DIR"] = str(self.folder)
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.folder / "tensorboard")
        (self.plan, self.settings) = broadcast_object_list(
            [*self._plan()]
        )  # of several processes all take the first one's
        s = self.settings
        arguments = trainer.training_arguments(
            s, dtype=self.dtype, device=self.machine.device, output_dir=self.folder
        )
        if not all(
            gather_object([(self.folder / "settings.json").is_file()])
        ):  # the first process has written it by now
            raise UserError(
                f"{self.folder} is not on every machine the folder that the first process writes: give an output_dir that all of them see."
            )
        self.method, tokens, layers = (
            self.plan.chosen,
            self.plan.method.tokens_per_batch,
            self.plan.method.checkpointed_layers,
        )
        chosen = {"method": self.method, "precision": str(self.dtype).removeprefix("torch.")}
        if s.optimizer != self.record["settings"]["optimizer"]:
            chosen["optimizer"] = s.optimizer
        self._write("settings.json", self.record | {"chosen": chosen})
        self.model = model.load_for_training(s, method=self.method, dtype=self.dtype, device=device)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        self.trainer = trainer.OrpoTrainer(
            self.model, arguments, s, self.train_pairs, self.eval_pairs,
            tokens_per_batch=tokens,
            checkpointed_layers=layers,
            on_row=self._on_row, callbacks=[
                self.stop, Progress(s.pairs_per_step),
                On(step_end=self._watch, save=self._mirror, train_begin=self._begin),
            ],
        )  # fmt: skip
        if s.objective == "dpo" and self.method == "full":  # afterwards the untrained model is gone
            self.trainer.remember_reference([*self.train_pairs, *self.eval_pairs])
        scorer = self.trainer.scorer
        self.show(f"{self.method}: {trained:,} of {total:,} weights are trained ({trained / total:.1%}).")
        self.show(
            f"Layout of a batch: {scorer.rung}."
            + "".join(f" Not {k}: {v}." for k, v in scorer.refused.items())
        )
        if kernels := attention.kernels_taken():
            self.show(f"Attention by: {'; '.join(kernels)}.")

    def _plan(self) -> tuple[planner.Plan, Settings]:
        plan, settings = _planned(
            self.settings, self.machine, planner.measured_lengths(self.train_pairs), begun=bool(checkpoints.complete(self.folder)),
            dtype=self.dtype, cards=int(os.environ["WORLD_SIZE"]) if self.fsdp else 1,
        )  # fmt: skip
        self.show(f"{plan.line()}.\n{plan.table()}")
        if not plan.method.fits:
            self.show("It is tried all the same: when memory runs out, batches shrink.")
        return plan, settings

    def cards(self) -> str:
        """What these pairs would take on each card that the planner knows, by each method, as text."""
        config, lengths = (
            model.load_config(self.settings.base_model),
            planner.measured_lengths(self.train_pairs),
        )
        return planner.cards_table(planner.plan_cards(config, self.settings, lengths))

    def example_loss(self) -> dict[str, float]:
        """The loss terms of a few held-out pairs as the model stands."""
        pairs = [self.eval_pairs[i] for i in range(min(4, len(self.eval_pairs)))] or [self.train_pairs[0]]
        sums = self.trainer.pair_tables(pairs).sum(0).tolist()
        return trainer.averages(sums, self.settings.objective, self.settings.or_weight)

    # Training.

    @_stage
    def train(self) -> None:
        """Evaluate and answer, train with the live picture, evaluate and answer again. Goes on from the newest complete
        checkpoint; after a stop it returns as after an end."""
        if self.finished:
            show_progress(self.folder)
            return
        found = checkpoints.complete(self.folder)
        last = int(found[-1].name.split("-")[1]) if found else -1
        if found and (wrote := checkpoints.sharding_of(found[-1])) != self.trainer.sharded:
            raise UserError(
                f"{found[-1]} was written {'with ' + wrote if wrote else 'without FSDP or DeepSpeed'}: go on with the accelerate "
                "config that the run began with, or choose another output_dir."
            )
        rows = self.folder / "history.jsonl"
        if self.main:  # what an earlier process left behind
            for name in ("history.jsonl", "watched.jsonl"):
                truncate_after(self.folder / name, last)
            remove(self.folder / ".saving")
        self.plot = LivePlot(
            self.folder / "live.png" if self.main else None, title=self._title(), total_steps=self._steps()
        )
        for row in read_rows(rows):
            self.plot.update(row)
        if found:
            self.show(f"Going on from step {last}.")
            known = read_json(self.folder / "held_out.json")
            self._write(
                "held_out.json", {name: part for name, part in known.items() if name != "after"}
            )  # of an earlier stop
        self.training_seconds = self.peak_before = self.training_peak = 0.0
        self.training_allocated = None
        with self.stop.listening(), _quiet(), contextlib.suppress(Stopped):
            try:
                if not found and not self.trainer.sharded:
                    self._look("before")
                self.peak_before, self.training_began = memory_gib(self.trainer.args.device), time.monotonic()
                forget_peak_memory()
                self.trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
                self.training_seconds = time.monotonic() - self.training_began
                self.training_peak = memory_gib(self.trainer.args.device)
                self.training_allocated = allocated_gib(self.trainer.args.device)
                if not self.stop.hurried or self.trainer.state.global_step >= self.trainer.state.max_steps:
                    self._look("after")
            finally:
                self.plot.close()
        done = 0 < self.trainer.state.max_steps <= self.trainer.state.global_step
        self.stopped = self.trainer.stop_reason or ("" if done else self.stop.reason)
        self.interrupted = bool(self.trainer.stop_reason) or (self.stop.asked and not done)
        if self.stopped:
            self.show(
                f"Stopped at step {self.trainer.state.global_step}: {self.stopped}. Run again to go on from there."
            )
        self.show(f"Reading of the curves: {reading.read_curves(read_rows(rows))}.")

    def _begin(self, step: int) -> None:
        if step == 0 and self.trainer.sharded:  # the model is spread over the processes only now
            self._look("before")
            self.trainer._window.take()
            self.training_began = time.monotonic()

    def _steps(self) -> int:
        s = self.settings
        a_pass = max(1, math.ceil(len(self.train_pairs) / s.pairs_per_step))
        return s.max_steps or math.ceil(a_pass * s.epochs)

    def _title(self) -> str:
        return (
            f"{self.settings.base_model.rstrip('/').split('/')[-1]} on {self.settings.dataset.split('/')[-1]}"
        )

    def _on_row(self, row: dict) -> None:
        append_row(self.folder / "history.jsonl", row)
        self.plot.update(row)
        if self.foreseen_minutes is None and "loss" in row and row["step"] >= FIRST_STEPS:
            self._foresee(row["step"])

    def _foresee(self, step: int) -> None:
        """How long all of this run takes, now that real steps and an evaluation have been timed."""
        tokens_left = (self._steps() - step) * self.settings.pairs_per_step * self.plan.lengths.mean
        left = (
            tokens_left / planner.tokens_per_second(read_rows(self.folder / "history.jsonl"))
            + self.looked_seconds
        )
        self.foreseen_minutes = (time.time() - self.started + left) / 60
        self.show(
            f"After {step} steps: {duration(left / 60)} left, {duration(self.foreseen_minutes)} in all."
        )

    def _look(self, when: str) -> None:
        """Figures and answers on the held-out pairs, `before` or `after` training; kept in held_out.json."""
        if not len(self.eval_pairs):
            return
        pairs = [self.eval_pairs[i] for i in range(len(self.eval_pairs))]
        some = min(self.settings.answers, len(pairs))
        base = model.adapters_off(self.trainer.model) if when == "before" else contextlib.nullcontext()

        def advance(bar, done):
            bar.update(done)
            if when == "before" and self.trainer.args.world_size == 1 and self.stop.look():
                raise Stopped  # nothing is written yet, and the next run begins here; several processes agree after a step

        began = time.monotonic()
        with base:
            with progress_bar(len(pairs), "held-out pairs", desc=f"evaluation {when}") as bar:
                table = self.trainer.pair_tables(pairs, partial(advance, bar))
            self.evaluated_seconds += time.monotonic() - began
            prompts = [p.prompt for p in pairs[:some]]
            with progress_bar(len(prompts), "answers", desc=f"answers {when}") as bar:
                texts = self._answer(prompts, partial(advance, bar))
        self.looked_seconds = time.monotonic() - began
        row = trainer.averages(table.sum(0).tolist(), self.settings.objective, self.settings.or_weight)
        evaluated = [r["step"] for r in read_rows(self.folder / "history.jsonl") if reading.is_evaluation(r)]
        if (
            self.trainer.state.global_step not in evaluated
        ):  # else the Trainer did it, or a kill came between then and now
            self.trainer.log({f"eval_{name}": value for name, value in row.items()})
        known = read_json(self.folder / "held_out.json")
        self._write("held_out.json", known | {
            "columns": trainer.SUMS,
            "prompts": [self.texts[i].prompt[-1]["content"] for i in range(some)],
            "chosen_shorter": [len(p.chosen) < len(p.rejected) for p in pairs],
            when: {"pairs": table.tolist(), "answers": texts},
        })  # fmt: skip

    def _watch(self, step: int) -> None:
        """Answers to the first held-out prompts while training goes on; kept in watched.jsonl and shown."""
        if not self.settings.watch_every_steps or step % self.settings.watch_every_steps:
            return
        prompts = [self.eval_pairs[i].prompt for i in range(min(3, len(self.eval_pairs)))]
        texts = self._answer(prompts)
        for pair, text in zip(self.texts, texts, strict=False):
            question = pair.prompt[-1]["content"]
            if self.main:
                append_row(self.folder / "watched.jsonl", {"step": step, "prompt": question, "answer": text})
            self.show(f"step {step} · {question[:60]!r} -> {text[:160]!r}")

    def _answer(self, prompts, on_batch=lambda done: None) -> list[str]:
        # Weights in float32 would give a cache in float32.
        with self.trainer.accelerator.autocast() if self.method == "full" else contextlib.nullcontext():
            return evaluate.answers(
                self.trainer.model, self.tokenizer, prompts, max_tokens=self.settings.answer_tokens, end_ids=self._end_ids(),
                on_batch=on_batch,
            )  # fmt: skip

    def _mirror(self, step: int = 0) -> None:
        """Copy what is complete to Google Drive, where that was chosen; training itself stays on the local disk."""
        if self.drive:
            mirror(self.folder, self.drive)

    def _end_ids(self) -> list[int]:
        own = self.tokenizer.eos_token_id
        return sorted({self.train_pairs[0].chosen[-1]} | ({own} if own is not None else set()))

    # The end.

    @_stage
    def finish(self) -> dict:
        """Save the model, summary.json and the card; returns the summary."""
        if self.finished:
            self._wrap_up()  # a kill may have come before
            return read_json(self.folder / "summary.json")
        state, stopped = self.trainer.state, self.stopped
        if self.main:
            remove(self.folder / "README.md")  # of an earlier stop
        weights = self.trainer.gathered_weights() if state.global_step else None
        if self.main and state.global_step:
            self.model.generation_config.eos_token_id = self._end_ids()
            with _quiet():
                model.save_model(
                    self.model,
                    self.tokenizer,
                    self.folder / "model",
                    base_model=self.settings.base_model,
                    weights=weights,
                )
        minutes = (time.time() - self.started) / 60
        as_planned = (
            self.training_seconds + self.evaluated_seconds
        ) / 60  # a plan knows neither answers nor loading
        summary = {
            "finished": not stopped,
            "why": stopped or "every step was taken",
            "steps": state.global_step,
            "epochs": round(state.epoch or 0.0, 4),
            "method": self.method,
            "layout": self.trainer.scorer.rung,
            "precision": str(self.dtype).removeprefix("torch."),
            "device": self.machine.name,
            "minutes": round(minutes, 3),
            "training_minutes": round(self.training_seconds / 60, 3),
            **self._work(),
            **self._peaks(),
            "bad_steps": self.trainer.bad_steps,
            "out_of_memory": self.trainer.oom_notes,
            "drawing_share": round(self.plot.cost_seconds / max(self.training_seconds, 1e-9), 4),
            "plan": self.plan.as_dict(),
            "planned_against_measured": {
                "peak_gib": [round(self.plan.method.peak_gib, 3), round(self.training_peak, 3)],
                "minutes": [round(self.plan.method.minutes, 3), round(as_planned, 3)],
                "minutes_of_the_whole_run_after_ten_steps": [
                    self.foreseen_minutes and round(self.foreseen_minutes, 3),
                    round(minutes, 3),
                ],
            },
            "versions": {
                name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "datasets")
            },
            **self.held_out_results(),
        }
        self._write("summary.json", summary)
        self.finished = not stopped
        self._wrap_up()
        if self.main and self.finished and self.settings.hub_repo:
            self.show(
                f"Pushed to {share.push(self.folder, self.settings.hub_repo)} (private unless it existed)."
            )
        return summary

    def _wrap_up(self) -> None:
        if self.main:
            if not (self.folder / "README.md").exists():
                write_atomically(self.folder / "README.md", card.write_card(self.folder).encode())
            if self.finished:
                checkpoints.remove(self.folder)
            self._mirror()

    def _peaks(self) -> dict[str, float | None]:
        """Of the whole run, with what is outside of torch's count; of training's tensors on a GPU, without that."""
        peak = max(self.peak_before, memory_gib(self.trainer.args.device))
        return {"peak_memory_gib": round(peak, 3), "peak_allocated_gib": self.training_allocated}

    def _work(self) -> dict[str, int]:
        """What training put through the model, from the history, which a stop and going on leave whole."""
        rows = read_rows(self.folder / "history.jsonl")
        return {name: int(sum(reading.values(rows, name))) for name in ("tokens", "forward_passes")}

    def held_out_results(self) -> dict:
        """What the held-out pairs say, from held_out.json: figures with intervals, the verdict, the demo's habit."""
        kept = read_json(self.folder / "held_out.json")
        if not {"before", "after"} <= kept.keys():
            return {}
        figures = evaluate.compare(*(evaluate.measures(kept, when) for when in ("before", "after")))
        results = {
            "accuracy_before": figures["accuracy"]["before"],
            "accuracy_after": figures["accuracy"]["after"],
            "verdict": evaluate.verdict(figures),
            "held_out": figures,
        }
        if self.settings.dataset == "demo":
            for when in ("before", "after"):
                results[f"habit_{when}"] = evaluate.habit_share(kept[when]["answers"])
        return results

    def answers(self) -> list[dict[str, str]]:
        """Held-out prompts with the answers of the base and of the tuned model."""
        kept = read_json(self.folder / "held_out.json")
        if not {"before", "after"} <= kept.keys():
            return []
        columns = kept["prompts"], kept["before"]["answers"], kept["after"]["answers"]
        return [
            dict(zip(("prompt", "base", "tuned"), row, strict=True)) for row in zip(*columns, strict=True)
        ]


def execute(settings: Settings, sources: dict[str, str], *, show: Callable[[str], None] = print) -> Run:
    """A whole run."""
    run = Run(settings, sources, show=show)
    run.load_pairs()
    run.load_model()
    run.train()
    summary = run.finish()
    run.show(summary.get("verdict", "No held-out figures: eval_pairs is 0, or the run was stopped early."))
    return run


def estimate(settings: Settings, device: str = "") -> planner.Plan:
    """The plan of a run before anything but the model's config.json is fetched: on a named card, or the machine at hand."""
    target = planner.find_card(device) if device else this_machine()
    return _planned(settings, target, _lengths(settings))[0]


def _planned(
    settings: Settings, target, lengths: planner.Lengths, *, begun: bool = False, **options
) -> tuple[planner.Plan, Settings]:
    """A plan, and the settings that it is of: AdamW without pages where its state fits beside the rest, for the same
    numbers sooner. A run that has begun keeps to its kind of state."""
    config = model.load_config(settings.base_model)
    plan = planner.make_plan(config, settings, target, lengths, begun=begun, **options)
    if settings.optimizer == "paged_adamw_32bit" and not begun:
        resident = dataclasses.replace(settings, optimizer="adamw")
        other = planner.make_plan(config, resident, target, lengths, **options)
        if other.method.fits and other.chosen == plan.chosen:
            return other, resident
    return plan, settings


def estimates(settings: Settings) -> list[planner.Plan]:
    """The same on every card that the planner knows."""
    return planner.plan_cards(model.load_config(settings.base_model), settings, _lengths(settings))


def _lengths(settings: Settings) -> planner.Lengths:
    """Of the pairs where these are on this machine already, else what is known of the dataset."""
    if not Path(settings.dataset).expanduser().is_file():
        return planner.preset_lengths(settings.dataset, settings)
    tokenizer = model.load_tokenizer(settings.base_model)
    prepare_tokenizer(tokenizer)
    encoder = Encoder(
        tokenizer,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_tokens=settings.max_tokens,
        overlong=settings.overlong,
    )
    cleaned, _ = data.clean(
        data.open_rows(settings.dataset, max_rows=settings.max_pairs), columns=settings.columns
    )
    return planner.measured_lengths([ids for _, ids in encoder.encode(cleaned) if not isinstance(ids, str)])


@contextlib.contextmanager
def _quiet():
    """Without transformers' own bars: one more appears at every checkpoint."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
