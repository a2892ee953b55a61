"""The loop: forward, loss, backward, clip, step, log, stop.

accelerate owns devices, precision, gradient scaling and many processes; transformers the schedules. A step's
pairs are split into token-budget micro-batches, and its loss does not depend on how: the nll is exact in
tokens, the odds term in pairs, over all processes. It draws, prints and downloads nothing.
"""

import contextlib
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor
from transformers import get_scheduler

from ..errors import UserError
from ..machine import attempt, memory_gib
from ..session import Stop
from ..settings import Settings, settle
from . import checkpoints, loss
from .batching import Batch, EncodedPair, StepOrder, collate, split_by_tokens
from .best import Best
from .body import checkpoint_layers, text_layers
from .optimizers import make_optimizer
from .processes import check_sharding, over_ranks, tracked
from .reference import Reference
from .scoring import LESS, PlainScorer, score

BAD_STEPS_ALLOWED = 3
COLUMNS = len(loss.TERMS) + 2  # of the sums of a step: those of a pair table, and two gradient norms
KEPT = ("step", "bad_steps", "oom_notes", "carried")  # in a checkpoint, beside weights, states and schedule


class OrpoTrainer:
    """Trains a causal LM on encoded pairs: `prepare`, `train`, `close`.

    Args:
        model: what is trained requires gradients, the rest does not.
        train_pairs, eval_pairs: anything with a length that gives an EncodedPair for an index.
        accelerator: from `make_accelerator`. folder: where checkpoints go.
        tokens_per_batch: computed at once. checkpointed_layers: whose activations are recomputed.
        make_scorer: called with the model once it is in its place; see scoring.py.
        stop: asked after every step whether to end.
        on_row: gets every row of the history, on the first process. on_step: gets the number of each step
            taken. on_save: called when a checkpoint is complete.

    Attributes:
        step, steps: taken, and in all. best: see best.py. bad_steps: left out as not finite, {step, rows of
            the dataset}. oom_notes: what was done when memory ran out. stop_reason: why it ended by itself,
            or empty. carried: what checkpoints keep for whoever trains, of plain numbers and texts.
    """

    def __init__(
        self,
        model,
        settings: Settings,
        train_pairs: Sequence[EncodedPair],
        eval_pairs: Sequence[EncodedPair] = (),
        *,
        accelerator: Accelerator,
        folder: Path,
        tokens_per_batch: int,
        checkpointed_layers: int = 0,
        make_scorer: Callable = PlainScorer,
        stop: Stop | None = None,
        on_row: Callable[[dict], None] = lambda row: None,
        on_step: Callable[[int], None] = lambda step: None,
        on_save: Callable[[], None] = lambda: None,
    ):
        # What no plan has settled.
        method = "full" if all(p.requires_grad for p in model.parameters()) else "lora"
        weights = sum(p.numel() for p in model.parameters())
        settings, _ = settle(settings, method=method, weights=weights, pairs=len(train_pairs))
        self.model, self.settings, self.accelerator, self.folder = model, settings, accelerator, Path(folder)
        self.train_pairs, self.eval_pairs, self.stop = train_pairs, eval_pairs, stop or Stop()
        self.on_row, self.on_step, self.on_save = on_row, on_step, on_save
        self.device, self.world = accelerator.device, accelerator.num_processes
        self.sharded = check_sharding(accelerator, model, settings)
        self.tokens_per_batch, self.oom_notes, self.bad_steps, self.stop_reason = tokens_per_batch, [], [], ""
        self.step = self._bad_in_a_row = 0
        set_seed(settings.seed)
        self.checkpointed_layers = checkpoint_layers(model, checkpointed_layers)
        with accelerator.autocast():
            self.scorer = make_scorer(model)
        self.reference = Reference(self) if settings.objective == "dpo" else None
        lengths = getattr(train_pairs, "lengths", None) or [pair.tokens() for pair in train_pairs]
        place = dict(rank=accelerator.process_index, world=self.world)
        self.order = StepOrder(lengths, settings.pairs_per_step, seed=settings.seed, **place)
        planned = settings.max_steps or math.ceil(settings.epochs * len(self.order))
        self.best = Best(settings, planned, len(eval_pairs))
        self.wrapped, self.optimizer, self.carried = model, None, {}
        self._start_window()

    steps = property(lambda self: self.best.steps)  # fewer than planned once patience is over

    def prepare(self, resume_from: Path | None = None) -> None:
        """Wrap the model for training, with its optimizer and schedule; load a checkpoint where one is given.

        Raises:
            UserError: the checkpoint is damaged, or was written by an earlier version.
            RuntimeError: steps were taken already, and no checkpoint takes their place.
        """
        s = self.settings
        if self.step and not resume_from:
            raise RuntimeError("trained already: make a new trainer, or go on from a checkpoint")
        self.optimizer = self.schedule = None
        self.accelerator.free_memory()  # of an earlier call, whose optimizer it would hold
        optimizer = make_optimizer(s, self.model, retry=self.world == 1)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        if self.sharded:  # accelerate puts the pieces in the place of the weights
            self.model = self.wrapped
            torch.distributed.fsdp.register_fsdp_forward_method(self.model, "generate")
        if self.reference and not hasattr(self.model, "disable_adapter") and not self.reference.sums:
            for pairs in (self.train_pairs, self.eval_pairs):  # afterwards the untrained model is gone
                self.reference.remember([pairs[i] for i in range(len(pairs))])
        span = dict(num_warmup_steps=s.warmup_steps, num_training_steps=self.best.planned)
        self.schedule = get_scheduler(s.lr_schedule, self.optimizer, **span)
        self.close()
        self.accelerator.trackers = []  # it would add to those of an earlier call
        self.accelerator.init_trackers(**tracked(s, self.folder))
        if resume_from:
            progress = checkpoints.load(Path(resume_from), self, self.optimizer)
            vars(self).update({name: progress[name] for name in KEPT if name in progress})
            self.best.found = progress.get("best", {})
            self.schedule.load_state_dict(progress["schedule"])

    def train(self) -> None:
        """Take the steps that are left, until somebody asks to stop, or numbers are no longer finite."""
        self._start_window()
        self._saved_at, self.stop_reason, self._bad_in_a_row = time.monotonic(), "", 0
        if self.best.is_due(self.step):  # an interrupt broke it off
            self.stop.try_to(self.evaluate)
        for pairs in self._steps_left():
            norm = self._clip(pairs, self._gradient(pairs))
            rate = self.schedule.get_last_lr()[0]
            self.optimizer.step()
            if not self.accelerator.optimizer_step_was_skipped:
                self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.step % self.settings.log_every_steps == 0:
                self._log_step(rate, norm)
            if self.best.is_due(self.step):
                self.stop.try_to(self.evaluate)
            self.on_step(self.step)
            stopping = self._asked_to_stop()
            if stopping or self._checkpoint_is_due():
                self.save()
            if stopping:
                break

    @property
    def epoch(self) -> float:
        """Tell how often the training pairs were gone through."""
        return self.step / len(self.order)

    def gathered_weights(self) -> dict[str, Tensor] | None:
        """Give the weights that FSDP has in pieces, whole on the first process; else None. All call it."""
        if not self.sharded:
            return None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(self.model, options=options)

    def close(self) -> None:
        """End the trackers; nothing is logged afterwards."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _steps_left(self):
        """Give this rank's pairs of each step left; their order needs no state, so a resume only counts."""
        while self.step < self.steps:
            epoch, done = divmod(self.step, len(self.order))
            for positions in self.order.steps(epoch, done):
                yield [self.train_pairs[i] for i in positions]
                if self.step >= self.steps:
                    return

    def _gradient(self, pairs: list[EncodedPair]) -> Tensor:
        """Leave the gradient of a step in the weights, in smaller pieces each time that memory runs out; the
        sums of TERMS over this rank's pairs, and two gradient norms, (COLUMNS,)."""
        if self.reference:
            self._work.update(self.reference.remember(pairs))
        self.wrapped.train()
        while True:
            self._computing = pairs
            found, message = attempt(partial(self._forward_backward, pairs))
            if not message:
                return found
            self.wrapped.zero_grad(set_to_none=True)
            self._use_less_memory(self._computing, message)

    def _forward_backward(self, pairs: list[EncodedPair]) -> Tensor:
        s, micro_batches = self.settings, self._micro_batches(pairs)
        of_prompt = s.nll_over != "answer"
        tokens = sum(len(p.chosen) + (len(p.prompt) - 1) * of_prompt for p in pairs)
        step = {"nll_tokens": over_ranks(self.accelerator, tokens), "or_weight": s.or_weight}
        step["pairs"] = over_ranks(self.accelerator, len(pairs))
        sums, work = torch.zeros(COLUMNS, device=self.device), Counter()
        for k, (micro, weight) in enumerate(micro_batches):
            self._computing, last = micro, k == len(micro_batches) - 1
            batch = collate(micro, nll_over=s.nll_over, layout=self.scorer.layout).to(self.device)
            # FSDP would hold whole gradients where it is told to wait.
            wait = not last and not self.sharded
            with (
                self.accelerator.no_sync(self.wrapped) if wait else contextlib.nullcontext(),
                self.scorer.inputs(batch) as inputs,
            ):
                logps, router_loss = self.scorer.read(self.wrapped(**inputs), batch)
                table = self._pair_table(logps, batch)
                share = loss.objective(loss.by_name(table), **step, name=s.objective)
                if router_loss is not None:
                    share = share + router_loss * len(micro) / step["pairs"]
                # DDP and FSDP average gradients over ranks; this loss is already the whole step's.
                self.accelerator.backward(share * weight * self.world)
            table = table.detach()
            norms = loss.gradient_norms(table, batch.lengths, **step, or_beta=s.or_beta)
            sums += torch.cat([table.sum(0), norms]) * weight
            work.update(tokens=batch.input_ids.numel(), forward_passes=1)
        self._work.update(work)  # only here: a step that ran out of memory does not count
        return sums

    def _pair_table(self, logps: Tensor, batch: Batch) -> Tensor:
        reference = self.reference and torch.stack([self.reference.sums[p.index] for p in batch.pairs])
        betas = self.settings.dpo_beta, self.settings.or_beta
        return loss.pair_table(logps, batch.segment, batch.lengths, reference, *betas)

    def _micro_batches(self, pairs: list[EncodedPair]) -> list[tuple[list[EncodedPair], float]]:
        batches = [(b, 1.0) for b in split_by_tokens(pairs, self.tokens_per_batch, self.scorer.layout)]
        if self.world > 1:
            # FSDP gathers weights in every forward, so every rank runs as many; the extra ones weigh nothing.
            most = over_ranks(self.accelerator, len(batches), max)
            batches = [([min(pairs, key=lambda p: p.tokens())], 0.0)] * (most - len(batches)) + batches
        return batches

    def _clip(self, pairs: list[EncodedPair], sums: Tensor) -> float:
        """Clip the gradient, take it away where a number is not finite, and keep the sums; the norm before
        clipping. All numbers come in one copy, for each waits for the device."""
        s, scaler = self.settings, self.accelerator.scaler
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), s.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP's
        sums = self.accelerator.reduce(sums)
        norm, *sums = torch.cat([norm.float().view(1).to(self.device), sums]).tolist()
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)]
        # Any part of the loss that is not finite shows in it, whatever it is divided by.
        terms = dict(zip(loss.TERMS, sums, strict=False))
        whole = loss.objective(terms, nll_tokens=1, pairs=1, or_weight=s.or_weight, name=s.objective)
        if math.isfinite(whole) and math.isfinite(norm):
            self._bad_in_a_row = 0
        elif not (math.isfinite(whole) and scaler is not None and scaler.get_scale() > 1):
            # Else float16's scaler skips the step and tries a smaller scale, which is its ordinary work.
            self._leave_out(pairs, "gradient" if math.isfinite(whole) else "loss")
        return norm

    def _leave_out(self, pairs: list[EncodedPair], what: str) -> None:
        step, rows = self.step + 1, gather_object([pair.index for pair in pairs])
        self.bad_steps.append({"step": step, "rows": rows})
        warnings.warn(f"step {step}: the {what} is not finite; skipped. Dataset rows: {rows}", stacklevel=4)
        self.wrapped.zero_grad(set_to_none=True)  # an optimizer step without gradients changes nothing
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= BAD_STEPS_ALLOWED:
            why = f"a loss or gradient that is not finite (last: step {step}, dataset rows {rows})"
            way_out = "try a lower learning_rate or precision=float32"
            self.stop_reason = f"{BAD_STEPS_ALLOWED} steps in a row had {why}; {way_out}"

    def _use_less_memory(self, micro: list[EncodedPair], message: str) -> None:
        """Halve the tokens computed at once, of which `micro` were too many; else checkpoint more layers."""
        layers = len(text_layers(self.model))
        if len(micro) > 1:
            tokens = sum(p.tokens(self.scorer.layout) for p in micro)  # a budget above them was never used up
            self.tokens_per_batch = max(1, min(self.tokens_per_batch, tokens) // 2)
            change = f"tokens_per_batch is now {self.tokens_per_batch}"
        elif self.checkpointed_layers < layers:
            more = math.ceil((layers + self.checkpointed_layers) / 2)
            self.checkpointed_layers = checkpoint_layers(self.model, more)
            with self.accelerator.autocast():
                attempt(self.scorer.prove)
            change = f"{self.checkpointed_layers} of {layers} layers are now checkpointed"
        else:
            why = f"on a single pair with every layer checkpointed ({message})"
            raise UserError(f"Out of memory in step {self.step + 1} {why}; {LESS}.")
        self.note(f"step {self.step + 1}: out of memory; {change}; the step is repeated with the same result")

    def note(self, text: str) -> None:
        """Keep, and warn of, what was done when memory ran out."""
        self.oom_notes.append(text)
        warnings.warn(text, stacklevel=3)

    def _asked_to_stop(self) -> bool:
        """Tell whether training ends here. Of several processes only what all know counts; a signal that
        comes meanwhile waits for the next step."""
        stop = self.stop
        asked = [stop.is_due(look=self.accelerator.is_main_process), stop.asked, stop.hurried]
        if self.world > 1:
            flags = self.accelerator.gather(torch.tensor([asked], dtype=torch.int32, device=self.device))
            asked = flags.amax(0).bool().tolist()
            stop.agree(*asked)
        return bool(self.stop_reason) or (asked[0] and self.step < self.steps)

    def _checkpoint_is_due(self) -> bool:
        """Go by steps; and by the first process's clock since the last one."""
        s, ended = self.settings, self.step >= self.steps
        by_steps = s.save_every_steps and (ended or self.step % s.save_every_steps == 0)
        if by_steps or self.step == self.best.step:
            return True
        if ended or not s.save_every_minutes:
            return False
        due = time.monotonic() - self._saved_at >= 60 * s.save_every_minutes
        return bool(over_ranks(self.accelerator, int(due and self.accelerator.is_main_process)))

    def pair_tables(self, pairs: Sequence[EncodedPair], on_batch=lambda done: None) -> Tensor:
        """Give `loss.pair_table` of pairs in their order, (pairs, terms) on the CPU; every rank all."""
        rows = {}
        if self.reference:
            self.reference.remember(pairs)
        for batch, logps in score(self, pairs):
            table = self._pair_table(logps, batch).cpu()
            rows |= dict(zip([p.index for p in batch.pairs], table, strict=True))
            on_batch(len(batch.pairs))
        return torch.stack([rows[p.index] for p in pairs])

    def evaluate(self, table: Tensor | None = None) -> dict[str, float]:
        """Log the figures of the held-out pairs, or of their `table`, each name after `eval_`."""
        some = list(range(0, len(self.eval_pairs), self.best.stride))
        table = self.pair_tables([self.eval_pairs[i] for i in some]) if table is None else table[some]
        row = {f"eval_{name}": value for name, value in self.metrics(table.sum(0).tolist()).items()}
        with self.stop.waiting():  # known and written down, or neither
            if self.best.is_due(self.step):  # all ranks go by the first one's rounding
                self.best.take_in(self.step, *broadcast_object_list([row["eval_loss"]]))
            self.log(row)
        return row

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Give the figures by name of the column sums of a pair table."""
        return loss.metrics(sums, self.settings.or_weight, self.settings.objective)

    def _start_window(self) -> None:
        """Begin the sums of a logged row, over all processes; its work is this process's."""
        self._sums, self._work, self._since = [0.0] * COLUMNS, Counter(), time.monotonic()

    def _log_step(self, learning_rate: float, norm: float) -> None:
        seconds = max(time.monotonic() - self._since, 1e-9)
        work = {name: over_ranks(self.accelerator, count) for name, count in self._work.items()}
        *sums, nll_norm, odds_norm = self._sums
        self._start_window()
        row = self.metrics(sums)
        if self.settings.objective == "orpo" and nll_norm > 0:
            row["odds_gradient_share"] = odds_norm**0.5 / (odds_norm**0.5 + nll_norm**0.5)
        row |= {"learning_rate": learning_rate, "grad_norm": norm}
        row |= {"pairs_per_second": sums[-1] / seconds, "tokens_per_second": work["tokens"] / seconds}
        self.log(row | work | {"memory_gib": memory_gib(self.device)})

    def log(self, row: dict[str, float]) -> None:
        """Hand a row of figures to the trackers, and to `on_row` with its step and epoch."""
        kind = "eval/" if "eval_loss" in row else "train/"
        told = {kind + name.removeprefix("eval_"): value for name, value in row.items()}
        self.accelerator.log(told, step=self.step)
        if self.accelerator.is_main_process:
            self.on_row({"step": self.step, "epoch": self.epoch} | row)

    def save(self, *, to_go_on: bool = True) -> None:
        """Write a checkpoint of this step, complete or not at all; without the optimizer if not `to_go_on`.
        Raises UserError where the disk is full or fails."""
        progress = {name: getattr(self, name) for name in KEPT}
        progress |= {"best": self.best.found, "schedule": self.schedule.state_dict()}
        checkpoints.save(self, progress, self.optimizer if to_go_on else None)
        self._saved_at = time.monotonic()
        self.on_save()
