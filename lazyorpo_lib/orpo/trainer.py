"""OrpoTrainer: transformers' Trainer, with steps made of token-budget micro-batches of pairs.

Optimizers, schedules, mixed precision, checkpoints, resume, trackers and many GPUs are the Trainer's and accelerate's.
Here: one batch of its data loader is all the pairs of an optimizer step; the step splits them into micro-batches, and its
loss does not depend on how (nll exact in tokens, the odds term exact in pairs, over all ranks). It draws and prints nothing.
"""

import contextlib
import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from types import MethodType

import torch
from accelerate.utils.memory import clear_device_cache
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from .. import folder as folders
from ..errors import UserError, explain_disk
from ..fast.layouts import PairScorer
from ..machine import attempt, memory_gib
from ..model import adapters_off, apply_liger, causal_lm
from ..session import SaveByTheClock, StepGuard, StepWindow
from ..settings import Settings
from . import checkpoints
from .batching import Batch, EncodedPair, StepSampler, collate, split_by_tokens
from .loss import dpo_loss, odds_ratio_loss

SUMS = (
    "nll",
    "nll_tokens",
    "or_loss",
    "log_odds_chosen",
    "log_odds_rejected",
    "logp_chosen",
    "logp_rejected",
    "accuracy",
    "dpo",
    "pairs",
)
LESS = "lower max_tokens, or choose method=qlora, or a smaller base_model"  # what to do where one pair is too much
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
}  # ours -> transformers', where they differ


def pair_table(logps: Tensor, batch: Batch, reference: Tensor | None = None, dpo_beta: float = 0.1) -> Tensor:
    """What is known of each pair, one column a name of SUMS: (B, len(SUMS)) float32, with gradient.

    Args:
        logps: (M,) log-probability of each scored token.
        reference: (B, 2) summed log-probabilities of chosen and rejected under DPO's frozen reference.
    """
    b = len(batch.pairs)
    sums = torch.zeros(3 * b, device=logps.device).index_add(0, batch.segment, logps.float())
    chosen, rejected, prompt = sums.view(3, b)
    chosen_tokens, rejected_tokens, prompt_tokens = batch.lengths.view(3, b)
    logp_chosen, logp_rejected = chosen / chosen_tokens, rejected / rejected_tokens
    odds = odds_ratio_loss(logp_chosen, logp_rejected)
    dpo = (
        torch.zeros_like(chosen) if reference is None else dpo_loss(chosen, rejected, *reference.T, dpo_beta)
    )
    return torch.stack(
        [-(chosen + prompt), chosen_tokens + prompt_tokens, odds.or_loss, odds.log_odds_chosen, odds.log_odds_rejected,
         logp_chosen, logp_rejected, (odds.log_odds_ratio > 0).float(), dpo, torch.ones_like(dpo)], dim=1,
    )  # fmt: skip


def averages(sums: Sequence[float], objective: str, or_weight: float) -> dict[str, float]:
    """The metrics of a set of pairs from the column sums of its `pair_table`."""
    total = dict(zip(SUMS, sums, strict=True))
    pairs = max(total.pop("pairs"), 1.0)
    nll = total.pop("nll") / max(total.pop("nll_tokens"), 1.0)
    row = {"nll": nll} | {name: value / pairs for name, value in total.items()}
    row["log_odds_ratio"] = row["log_odds_chosen"] - row["log_odds_rejected"]
    dpo = row.pop("dpo")
    row["loss"] = (
        dpo if objective == "dpo" else nll + (or_weight * row["or_loss"] if objective == "orpo" else 0.0)
    )
    return row


def training_arguments(
    settings: Settings, *, dtype: torch.dtype, device: str, output_dir: Path
) -> TrainingArguments:
    """Our settings in the Trainer's words."""
    args = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=1,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_schedule,
        warmup_steps=settings.warmup_steps,
        optim=OPTIMIZERS.get(settings.optimizer, settings.optimizer),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device == "cpu",
        logging_steps=settings.log_every_steps,
        logging_nan_inf_filter=False,  # it hides a NaN behind old losses
        eval_strategy="steps" if settings.eval_every_steps and settings.eval_pairs else "no",
        eval_steps=settings.eval_every_steps or None,
        save_strategy="steps" if settings.save_every_steps else "no",
        save_steps=settings.save_every_steps or 500,
        seed=settings.seed,
        data_seed=settings.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=settings.report_to,
        ddp_broadcast_buffers=False,  # rotary tables, the same everywhere; ranks score unequal numbers of batches for DPO's reference
    )
    _ = args.device
    args._n_gpu = min(
        args.n_gpu, 1
    )  # nn.DataParallel would cut a packed row in two; many GPUs are accelerate's
    return args


def checkpoint_layers(model, count: int) -> int:
    """Recompute the activations of `count` layers in the backward (all of them if there are fewer); returns how many."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if count and layers:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i < count
    return min(count, len(layers))


class OrpoTrainer(Trainer):
    """Trains a causal LM on encoded pairs.

    Args:
        model: from `model.load_for_training`.
        settings: learning rate, or_weight and so on.
        train_pairs, eval_pairs: anything with a length that gives an EncodedPair for an index.
        tokens_per_batch: tokens computed at once.
        checkpointed_layers: layers whose activations are recomputed.
        on_row: called on the first process with every row of the history.
    """

    loss_is_scaled_for_ga = True  # the step's loss is whole; nothing divides it again

    def __init__(
        self,
        model,
        args: TrainingArguments,
        settings: Settings,
        train_pairs: Sequence[EncodedPair],
        eval_pairs: Sequence[EncodedPair] = (),
        *,
        tokens_per_batch: int,
        checkpointed_layers: int = 0,
        on_row: Callable[[dict], None] = lambda row: None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.settings, self.on_row = settings, on_row
        self.tokens_per_batch, self.oom_notes = tokens_per_batch, []
        self.stop_reason, self._bad_in_a_row, self._rows_of_step = "", 0, []
        self._reference: dict[int, Tensor] = {}
        self._window = StepWindow()
        own = StepGuard(self), SaveByTheClock(settings.save_every_minutes)
        super().__init__(
            model, args, train_dataset=train_pairs, eval_dataset=eval_pairs, callbacks=[*own, *callbacks]
        )
        self.sharded = "FSDP" if self.is_fsdp_enabled else "DeepSpeed" if self.is_deepspeed_enabled else ""
        if self.sharded:
            self._check_sharding()
        if (
            settings.liger_kernel
        ):  # before the scorer takes the model's forward, and proves what it computes with
            apply_liger(model)
        # After the Trainer has put the model in its place, before it wraps it for training.
        with self.accelerator.autocast():
            self.scorer = PairScorer(causal_lm(model))
        self.checkpointed_layers = checkpoint_layers(model, checkpointed_layers)
        self.remove_callback(PrinterCallback)
        self.sampler = None

    def _check_sharding(self) -> None:
        """Of weights spread over the processes: refuse what would be wrong."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin and plugin.fsdp_version != 2:
            raise UserError(
                "The accelerate config asks for the first version of FSDP: set fsdp_version: 2, as in configs/fsdp2.yaml."
            )
        if plugin and plugin.cpu_ram_efficient_loading:
            raise UserError(
                "Every process must see the weights: set fsdp_cpu_ram_efficient_loading: false in the accelerate config."
            )
        deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if (
            deepspeed and deepspeed.zero_stage == 3
        ):  # head.py and adapters.py read weights outside the module that ZeRO-3 gathers them for
            raise UserError(
                "ZeRO-3 is not supported: take configs/fsdp2.yaml, which spreads the same over the GPUs, or ZeRO stage 2."
            )
        if self.settings.objective == "dpo" or getattr(self.model, "is_loaded_in_4bit", False):
            raise UserError(
                "FSDP and DeepSpeed train neither 4-bit weights nor objective=dpo: choose method=lora or full, or DDP."
            )
        if (
            plugin and plugin.mixed_precision_policy
        ):  # accelerate's would round log-probabilities and gradient sums to 16 bit
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )

    def gathered_weights(self) -> dict[str, Tensor] | None:
        """The trained weights in one piece on the first process, where they are spread over all; else None. Every process calls it."""
        if self.is_fsdp_enabled:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            return get_model_state_dict(self.model, options=options)
        return self.accelerator.get_state_dict(self.model_wrapped) if self.is_deepspeed_enabled else None

    # Data: one batch of the loader = this rank's pairs of one optimizer step.

    def get_train_dataloader(self) -> DataLoader:
        pairs = self.train_dataset
        lengths = (
            pairs.lengths if hasattr(pairs, "lengths") else [p.tokens(self.scorer.layout) for p in pairs]
        )
        self.sampler = StepSampler(
            lengths, self.settings.pairs_per_step, seed=self.settings.seed,
            rank=self.args.process_index, world=self.args.world_size,
        )  # fmt: skip
        return DataLoader(pairs, batch_sampler=self.sampler, collate_fn=_as_step)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if (
            self.state.global_step >= self.state.max_steps
        ):  # resumed from the last checkpoint, the Trainer would take one step more
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def floating_point_ops(self, inputs) -> int:
        return 0  # the Trainer's own guess knows neither shared prompts nor adapters

    # The step.

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        pairs = inputs["pairs"]
        self._rows_of_step, self._computing = [p.index for p in pairs], pairs
        if self.settings.objective == "dpo":
            self._remember_reference(pairs)
        model.train()
        while True:
            loss, message = attempt(partial(self._forward_backward, model, pairs))
            if not message:
                return loss
            model.zero_grad(set_to_none=True)
            self._use_less_memory(self._computing, message)

    def _forward_backward(self, model, pairs: list[EncodedPair]) -> Tensor:
        settings, world = self.settings, self.args.world_size
        micro_batches = self._micro_batches(pairs)
        total_pairs = self._over_ranks(len(pairs))
        nll_tokens = sum(len(p.chosen) + (len(p.prompt) - 1) * (settings.nll_over != "answer") for p in pairs)
        nll_tokens = self._over_ranks(nll_tokens)
        step_loss = torch.zeros((), device=self.args.device)
        sums = torch.zeros(
            len(SUMS) + 2, device=self.args.device
        )  # and the squared gradient norms of the two terms
        work = Counter()
        for k, (micro, weight) in enumerate(micro_batches):
            self._computing = micro
            batch = collate(micro, nll_over=settings.nll_over, layout=self.scorer.layout).to(self.args.device)
            last = k == len(micro_batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(
                last
            )  # DeepSpeed steps in the backward that synchronizes
            # FSDP would hold whole gradients where it is told to wait.
            synced = last or world == 1 or self.sharded
            with (
                contextlib.nullcontext() if synced else self.accelerator.no_sync(model),
                self.scorer.inputs(batch) as inputs,
            ):
                logps, router_loss = self.scorer.read(model(**inputs), batch)
                table = pair_table(logps, batch, self._reference_of(micro), settings.dpo_beta)
                column = dict(zip(SUMS, table.sum(0).unbind(), strict=True))
                if settings.objective == "dpo":
                    loss = column["dpo"] / total_pairs
                else:
                    or_weight = settings.or_weight if settings.objective == "orpo" else 0.0
                    loss = column["nll"] / nll_tokens + or_weight * column["or_loss"] / total_pairs
                if router_loss is not None:
                    loss = loss + router_loss * len(micro) / total_pairs
                # DDP and FSDP average gradients over ranks; this loss is already the whole step's.
                self.accelerator.backward(loss * weight * world)
            step_loss += loss.detach() * weight
            table = table.detach()
            sums += (
                torch.cat([table.sum(0), self._term_norms(table, batch.lengths, nll_tokens, total_pairs)])
                * weight
            )
            work.update(tokens=batch.input_ids.numel(), forward_passes=1)
        self._window.work.update(work)  # only here: a step that ran out of memory does not count
        self._unread = torch.cat([step_loss[None], sums])
        return step_loss * world  # the Trainer averages what it logs over ranks

    def _get_grad_norm(self, model, grad_norm=None) -> float:
        """The one look at the device in a step: the gradient's norm, the loss, and the sums that are logged."""
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP's
        # DeepSpeed's is a number, or None at first.
        norm = torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=self.args.device)
        found = self._unread if self.args.world_size == 1 else self.accelerator.reduce(self._unread)
        self.grad_norm, self.step_loss, *sums = torch.cat([norm.view(1), found]).tolist()
        self._window.add(sums)
        return self.grad_norm

    def _term_norms(self, table: Tensor, lengths: Tensor, nll_tokens: int, pairs: int) -> Tensor:
        """Squared norms of the gradients of the nll and of the weighted odds term with respect to the token log-probabilities,
        where the two terms meet: (2,), zeros where only one is trained."""
        if self.settings.objective != "orpo":
            return torch.zeros(2, device=table.device)
        column = dict(zip(SUMS, table.T, strict=True))
        of_nll = column["nll_tokens"].sum() / nll_tokens**2
        logp = torch.stack([column["logp_chosen"], column["logp_rejected"]])
        # d or_loss / d log odds; d log odds / d logp = 1 / (1 - P), which loss.py's clamp makes 0 where P is all but 1.
        outer = (
            torch.sigmoid(column["log_odds_rejected"] - column["log_odds_chosen"])
            * self.settings.or_weight
            / pairs
        )
        slope = torch.where(logp <= -1e-6, -outer / torch.expm1(logp), 0.0)
        return torch.stack([of_nll, (slope.square() / lengths.view(3, -1)[:2]).sum()])

    def _micro_batches(self, pairs: list[EncodedPair]) -> list[tuple[list[EncodedPair], float]]:
        batches = [(b, 1.0) for b in split_by_tokens(pairs, self.tokens_per_batch, self.scorer.layout)]
        if self.args.world_size > 1:
            # FSDP gathers weights in every forward, so every rank must run as many; the extra ones weigh nothing.
            most = self.accelerator.gather(torch.tensor([len(batches)], device=self.args.device)).max().item()
            batches = [([min(pairs, key=lambda p: p.tokens())], 0.0)] * (most - len(batches)) + batches
        return batches

    def _over_ranks(self, count: int) -> int:
        if self.args.world_size == 1:
            return count
        return int(self.accelerator.reduce(torch.tensor(count, device=self.args.device)).item())

    def _use_less_memory(self, micro: list[EncodedPair], message: str) -> None:
        """After an out-of-memory in `micro`: half its tokens at once; where it is a single pair, more checkpointed layers."""
        clear_device_cache()
        layers = sum(isinstance(m, GradientCheckpointingLayer) for m in self.model.modules())
        if len(micro) > 1:
            tokens = sum(p.tokens(self.scorer.layout) for p in micro)  # a budget above them was never used up
            self.tokens_per_batch = max(1, min(self.tokens_per_batch, tokens) // 2)
            change = f"tokens_per_batch is now {self.tokens_per_batch}"
        elif self.checkpointed_layers < layers:
            more = self.checkpointed_layers + max(1, math.ceil((layers - self.checkpointed_layers) / 2))
            self.checkpointed_layers = checkpoint_layers(self.model, more)
            change = f"{self.checkpointed_layers} of {layers} layers are now checkpointed"
        else:
            raise UserError(
                f"Out of memory in step {self.state.global_step + 1} on a single pair with every layer checkpointed ({message}); {LESS}."
            )
        step = f"step {self.state.global_step + 1}"
        self._note(f"{step}: out of memory; {change}; the step is repeated with the same result")

    def _note(self, text: str) -> None:
        self.oom_notes.append(text)
        warnings.warn(text, stacklevel=3)

    # DPO's reference: the model before training, its sums computed once for each pair.

    def _remember_reference(self, pairs: Sequence[EncodedPair]) -> None:
        missing = [p for p in pairs if p.index not in self._reference]
        if missing and not hasattr(self.model, "disable_adapter"):
            raise RuntimeError("full tuning: remember_reference() must run before the first step")
        self.remember_reference(missing)

    def remember_reference(self, pairs: Sequence[EncodedPair]) -> None:
        """Keep the summed log-probabilities of `pairs` under the untrained model, for objective="dpo"."""
        with adapters_off(self.model):
            for batch, logps in self._score(pairs):
                b = len(batch.pairs)
                sums = torch.zeros(3 * b, device=logps.device).index_add(0, batch.segment, logps)
                self._reference |= {
                    p.index: s for p, s in zip(batch.pairs, sums[: 2 * b].view(2, b).T, strict=True)
                }
                self._window.work.update(tokens=batch.input_ids.numel(), forward_passes=1)

    def _reference_of(self, pairs: Sequence[EncodedPair]) -> Tensor | None:
        return (
            torch.stack([self._reference[p.index] for p in pairs])
            if self.settings.objective == "dpo"
            else None
        )

    # Evaluation.

    def _score(self, pairs: Sequence[EncodedPair]):
        """Micro-batches of `pairs` with their log-probabilities, without gradient, in evaluation mode; smaller ones
        where memory runs out."""
        layout, training = self.scorer.layout, self.model.training
        self.model_wrapped.eval()
        waiting = split_by_tokens(list(pairs), self.tokens_per_batch, layout)[::-1]
        try:
            while waiting:
                micro = waiting.pop()
                scored, message = attempt(partial(self._logps, micro))
                if not message:
                    yield scored
                    continue
                if len(micro) == 1:
                    raise UserError(f"Out of memory in evaluating a single pair ({message}); {LESS}.")
                budget = max(1, sum(p.tokens(layout) for p in micro) // 2)
                waiting = split_by_tokens([p for some in (*waiting, micro) for p in some], budget, layout)[
                    ::-1
                ]
                self._note(f"evaluation: out of memory; it goes on with {budget} tokens at once")
        finally:
            self.model_wrapped.train(training)

    @torch.no_grad()
    def _logps(self, micro: list[EncodedPair]) -> tuple[Batch, Tensor]:
        batch = collate(micro, nll_over=self.settings.nll_over, layout=self.scorer.layout).to(
            self.args.device
        )
        with self.accelerator.autocast(), self.scorer.inputs(batch) as inputs:
            return batch, self.scorer.read(self.model_wrapped(**inputs), batch)[0]

    def pair_tables(
        self, pairs: Sequence[EncodedPair], on_batch: Callable[[int], None] = lambda done: None
    ) -> Tensor:
        """`pair_table` of each pair in the order given, (len(pairs), len(SUMS)) on the CPU. Every rank computes all."""
        rows = {}
        if self.settings.objective == "dpo":
            self._remember_reference(pairs)
        for batch, logps in self._score(pairs):
            table = pair_table(logps, batch, self._reference_of(batch.pairs), self.settings.dpo_beta)
            rows |= dict(zip([p.index for p in batch.pairs], table.cpu(), strict=True))
            on_batch(len(batch.pairs))
        return torch.stack([rows[p.index] for p in pairs])

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        if not len(pairs):
            return {}
        sums = self.pair_tables(pairs).sum(0).tolist()
        row = averages(sums, self.settings.objective, self.settings.or_weight)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in row.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # The optimizer.

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        if self.args.world_size == 1:
            optimizer.step = MethodType(
                partial(self._step, type(optimizer).step), optimizer
            )  # schedulers ask for __func__
        if getattr(optimizer, "is_paged", False):
            optimizer.load_state_dict = partial(_load_paged, optimizer)
        return optimizer

    def _step(self, step, optimizer, *args, **kwargs):
        """An optimizer's step. The first allocates the state, and is taken again where memory ran out in it."""
        if optimizer.state:
            return step(optimizer, *args, **kwargs)
        message = attempt(partial(step, optimizer, *args, **kwargs))[1]
        if message:
            *_, last = optimizer.state or (
                None,
            )  # at work when it happened; some count the step before they take it
            for parameter, state in list(optimizer.state.items()):
                if state.get("step", 0) > 0 and parameter is not last:
                    parameter.grad = None  # it has been updated
                else:
                    del optimizer.state[parameter]
            message = attempt(partial(step, optimizer, *args, **kwargs))[1]
        if message:
            raise UserError(
                f"Out of memory for the optimizer's state ({message}); choose optimizer=adamw_8bit, or method=lora."
            )

    # What is written down.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sums, work, seconds = self._window.take()
            work = {name: self._over_ranks(count) for name, count in work.items()}
            *sums, nll_norm, odds_norm = sums
            row = averages(sums, self.settings.objective, self.settings.or_weight)
            if self.settings.objective == "orpo" and nll_norm > 0:
                row["odds_gradient_share"] = odds_norm**0.5 / (odds_norm**0.5 + nll_norm**0.5)
            row |= {name: logs[name] for name in ("learning_rate", "grad_norm") if name in logs}
            row["pairs_per_second"], row["tokens_per_second"] = sums[-1] / seconds, work["tokens"] / seconds
            row |= work
            row["memory_gib"] = memory_gib(self.args.device)
            logs = row
        super().log(logs, start_time)
        if self.is_world_process_zero() and ("loss" in logs or "eval_loss" in logs):
            self.on_row({"step": self.state.global_step, "epoch": round(self.state.epoch or 0.0, 6)} | logs)

    # Checkpoints.

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except (UnpicklingError, SafetensorError):
            if resume_from_checkpoint is None:
                raise
            raise UserError(
                f"{resume_from_checkpoint} is damaged, or holds code, which is never run: delete that folder, and the run goes on "
                "from the checkpoint before it."
            ) from None

    @property
    def bad_steps(self) -> list[dict]:
        """Steps left out because their gradient was not finite, with the dataset rows of each; also those before a resume."""
        return [
            {"step": row["step"], "rows": row["bad_rows"]}
            for row in self.state.log_history
            if "bad_rows" in row
        ]

    def _save_checkpoint(self, model, trial) -> None:
        """As the Trainer's, but a checkpoint appears under its name complete or not at all."""
        home, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        scratch = home / ".saving"
        self.args.output_dir = str(scratch)
        try:
            with explain_disk(home):
                if self.args.should_save:
                    folders.take(home, "run", f"{scratch.name}/", f"{name}/")
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    folders.remove(home / name)
                    folders.put(scratch / name, home / name, "checkpoint")
        finally:
            self.args.output_dir = str(home)
            if self.args.should_save:
                folders.remove(scratch)
        if self.args.should_save:
            checkpoints.remove(home, keep=self.settings.keep_checkpoints)
        self.accelerator.wait_for_everyone()


def _as_step(pairs: list[EncodedPair]) -> dict:
    return {"pairs": pairs}


def _load_paged(optimizer, state_dict: dict) -> None:
    """Load a paged optimizer's state into pages again; bitsandbytes' own loading would leave it on the GPU for good."""
    type(optimizer).load_state_dict(
        optimizer, state_dict, move_to_device=False
    )  # the small rest follows at the first step
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in state:
                buffer = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                if parameter.is_cuda:
                    torch.cuda.synchronize()  # its zeros are on their way
                state[name] = buffer.copy_(state[name])
