"""Training loop for all tasks, and the command ``train``.

A step is one optimizer update: ``accumulate`` passes over ``batch_size`` images in each process. Random numbers in a
pass depend only on the seed, the index of the pass and the rank, not on previous passes: a resumed run continues as
if it had not been interrupted, without saving generator states.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_state_dict,
)

from xformer.errors import UsageError
from xformer.recipes.checkpoint import Checkpoints, check_same_run
from xformer.recipes.data.order import Replica, seed_all
from xformer.recipes.eval import check_finite, evaluate, try_evaluation
from xformer.recipes.files import held, make_folder, writing
from xformer.recipes.interrupt import Interrupts
from xformer.recipes.log import Log
from xformer.recipes.optimizer import create_optimizer, create_scheduler
from xformer.recipes.settings import Recipe, add_settings, from_options
from xformer.recipes.tasks import find_task
from xformer.recipes.weights import learned, not_finite, save_weights, start_from
from xformer_kernels.layer import calibration

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Run:
    """A run of a recipe in this process, which may be one of several started by torchrun or accelerate."""

    def __init__(self, recipe: Recipe, resume: bool = False) -> None:
        from accelerate import Accelerator

        self.recipe, self.out = recipe, Path(recipe.out)
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        # without `cpu`, processes started by torchrun on a machine without an accelerator form no process group
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            gradient_accumulation_steps=recipe.accumulate,
            mixed_precision=recipe.precision,
            step_scheduler_with_optimizer=False,
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.sharded = self.accelerator.distributed_type.name == "FSDP"
        if self.sharded and recipe.ema:
            raise UsageError(f"ema must be 0 where parameters are sharded (FSDP), got {recipe.ema}")
        if recipe.sync_bn and self.device.type != "cuda":
            raise UsageError(f"sync_bn must be off on {self.device}: torch synchronises batch norm on GPUs only")
        self.task = find_task(recipe.task)(recipe, Replica(self.rank, self.world))
        self.per_epoch = self.task.data.batches_per_epoch // recipe.accumulate
        if self.per_epoch < 1:
            raise UsageError(
                f"batch_size: {self.task.data.train_images} training images make no step of {recipe.accumulate} x "
                f"{recipe.batch_size} images in {self.world} processes"
            )
        self.steps = recipe.epochs * self.per_epoch
        self.step, self.evaluated, self.best = 0, 0, -math.inf
        self.loss_sum, self.loss_count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        self.checkpoints = Checkpoints(self.out, recipe.keep)
        found = self.checkpoints.all()
        if found and not resume:
            raise UsageError(
                f"out: {self.out} holds the checkpoint {found[-1].name}: go on with --resume, or name another --out"
            )
        self._build()
        if found:
            self._load(found[-1])

    def _build(self) -> None:
        from timm.utils import ModelEmaV3

        recipe = self.recipe
        seed_all(recipe.seed)
        model = self.task.build()
        self.said: list[str] = []
        if recipe.weights:
            left_out = start_from(model, self.task.card(), recipe.weights, recipe.partial)
            self.said = [f"weights: left out: {said}" for said in left_out]
        if recipe.warmup_epochs >= recipe.epochs:
            self.said.append(
                f"warmup_epochs: {recipe.warmup_epochs:g} are not less than the {recipe.epochs} epochs of the run, "
                f"whose learning rate does not reach lr={recipe.lr:g}"
            )
        if recipe.grad_checkpointing:
            switch: Any = getattr(model, "set_grad_checkpointing", None)
            if switch is None:
                raise UsageError(f"grad_checkpointing: {recipe.model} does not offer it")
            switch()
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if recipe.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.ema = None
        if recipe.ema:
            self.ema = ModelEmaV3(model.to(self.device), decay=recipe.ema, use_warmup=True)
        optimizer = create_optimizer(model, recipe)
        self.scheduler = create_scheduler(optimizer, recipe, self.per_epoch)
        if recipe.compile:
            model.compile()
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    # ------------------------------------------------------------------------------------------------- training

    def fit(self) -> dict[str, float]:
        """Train from the current step to the last epoch.

        Returns the metrics of the last evaluation, and ``best``, the best value of the task's main metric.
        """
        main = self.accelerator.is_main_process
        if main:
            make_folder("out", self.out)
        try:
            with held("out", self.out) if main else nullcontext(), Interrupts() as self.interrupts:
                return self._fit(main)
        except KeyboardInterrupt:
            kept = self.checkpoints.all()
            hint = f"go on from {kept[-1]} with --resume" if kept else f"there is no checkpoint in {self.out} yet"
            raise KeyboardInterrupt(f"stopped at step {self.step} of {self.steps}: {hint}") from None

    def _fit(self, main: bool) -> dict[str, float]:
        recipe = self.recipe
        result: dict[str, float] = {}
        with Log(self.out, self.step, self.evaluated, self.steps, recipe.tensorboard, main) as self.log:
            for said in self.said:
                self.log.say(said)
            self._try_evaluation()
            done = self.step // self.per_epoch
            if self.step == done * self.per_epoch > self.evaluated and self._is_evaluated(done - 1):
                result = self._evaluate(done - 1)  # stopped between the checkpoint and its evaluation
            for epoch in range(done, recipe.epochs):
                self._epoch(epoch)
                if self._is_evaluated(epoch):
                    self._average_statistics()
                self._save()
                if self._is_evaluated(epoch):
                    result = self._evaluate(epoch)
                self.log.say(f"epoch {epoch + 1} of {recipe.epochs}, step {self.step}{self.task.data.skipped.said()}")
            if not result:  # resumed at the end
                result = self.evaluate()
            self._write("last")
        self.accelerator.wait_for_everyone()
        return result | {"best": max(self.best, result[self.task.metric])}

    def _is_evaluated(self, epoch: int) -> bool:
        return epoch == self.recipe.epochs - 1 or (epoch + 1) % self.recipe.eval_every == 0

    def _epoch(self, epoch: int) -> None:
        recipe = self.recipe
        self.model.train()
        start = self.step % self.per_epoch
        batches = self.task.data.train(epoch, start * recipe.accumulate)
        began, images_seen = time.perf_counter(), 0
        for _ in range(start, self.per_epoch):
            self.scheduler.step_update(self.step)
            for part in range(recipe.accumulate):
                images, targets = next(batches)
                images_seen += len(images)
                seed_all(recipe.seed, self.step * recipe.accumulate + part, self.rank)
                self._pass(images, targets)
            self.step += 1
            if self.ema is not None:
                self.ema.update(self.accelerator.unwrap_model(self.model), self.step)
            self.log.advance(self.step)
            if self.step % recipe.log_every == 0:
                speed = self.world * images_seen / (time.perf_counter() - began)
                began, images_seen = time.perf_counter(), 0
                row = {"step": self.step, "epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]}
                self.log.add("train", row | {"loss": self._total_loss() / self.loss_count, "images/s": speed})
                self.loss_sum, self.loss_count = torch.zeros_like(self.loss_sum), 0
                self._stop_if_asked()
            elif self.world == 1:  # several processes only agree on it when logging, which communicates anyway
                self._stop_if_asked()
            every = recipe.checkpoint_every
            if every and self.step % every == 0 and self.step % self.per_epoch:
                self._save()

    def _stop_if_asked(self) -> None:
        """Stop if any process was interrupted, except at the end of an epoch, where a checkpoint is written anyway."""
        if self.step % self.per_epoch == 0:
            return
        asked = self.interrupts.asked
        if self.world > 1:
            asked = self._anywhere(asked)
        if asked:
            self._save()
            self.accelerator.wait_for_everyone()
            raise KeyboardInterrupt

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so in any process."""
        count: Any = self.accelerator.reduce(torch.tensor(float(here), device=self.device), "sum")
        return bool(count > 0)

    def _pass(self, images: Tensor, targets: Any) -> None:
        from accelerate.utils import send_to_device

        images, targets = send_to_device((images, targets), self.device, non_blocking=True)
        images, targets = self.task.mix(images, targets)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.accelerator.accumulate(self.model):
            try:
                outputs = self.model(images)
            except ValueError as error:
                if "more than 1 value per channel" not in f"{error}":
                    raise
                raise UsageError(
                    f"batch_size must leave batch norms of {self.recipe.model} more than one value a channel, got "
                    f"{len(images)} with images of {images.shape[-2]} x {images.shape[-1]} pixels"
                ) from error
            loss = self.task.loss(outputs, targets)
            self.accelerator.backward(loss)
            if self.recipe.clip_grad and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.loss_sum += loss.detach().double()
        self.loss_count += 1

    def _total_loss(self) -> float:
        """Sum of the losses since the last row of the log, averaged over processes."""
        total = float(self.accelerator.reduce(self.loss_sum.clone(), "mean"))
        if not math.isfinite(total):
            raise UsageError(f"lr: the loss is {total} at step {self.step}: {self._remedy()}")
        return total

    def _check_weights(self) -> None:
        """Raise UsageError in all processes if weights are not finite in any of them."""
        models = [self.model] if self.ema is None else [self.model, self.ema.module]
        found = (not_finite(learned(model)) for model in models)
        wrong = next((name for name in found if name is not None), None)
        if self._anywhere(wrong is not None):
            raise UsageError(
                f"lr: weights are not finite at step {self.step}, {wrong or 'in another process'} for one: "
                f"{self._remedy()}"
            )

    def _remedy(self) -> str:
        return (
            f"take a lower one than {self.recipe.lr}, or clip_grad (checkpoints in {self.checkpoints.folder} are from "
            f"before)"
        )

    # ----------------------------------------------------------------------------------------------- evaluation

    def _plain(self) -> nn.Module:
        """The model to evaluate and save: the averaged (EMA) model if there is one."""
        if self.ema is not None:
            averaged: nn.Module = self.ema.module
            return averaged
        return self.model if self.sharded else self.accelerator.unwrap_model(self.model)

    def _try_evaluation(self) -> None:
        model = None if self.sharded else self._plain()
        try_evaluation(model, self.task, self.device, self.recipe.channels_last, self.accelerator.autocast)

    def evaluate(self) -> dict[str, float]:
        """Return the metrics over all evaluation images."""
        model, metrics = self._plain(), self.task.metrics(self.device)
        training, channels_last, autocast = model.training, self.recipe.channels_last, self.accelerator.autocast
        model.eval()
        try:
            evaluate(model, self.task, metrics, self.device, channels_last, autocast, self.sharded)
        finally:
            model.train(training)
        return metrics.compute()

    def _average_statistics(self) -> None:
        """Average the running statistics of batch norms over all processes."""
        if self.world > 1 and not self.sharded:
            from timm.utils import distribute_bn

            for model in (self.accelerator.unwrap_model(self.model), self.ema and self.ema.module):
                if model is not None:
                    distribute_bn(model, self.world, reduce=True)

    def _evaluate(self, epoch: int) -> dict[str, float]:
        """Evaluate at the newest checkpoint, and record in it that this was done."""
        with self.interrupts.at_once():
            result = self.evaluate()
        self.log.add("eval", {"step": self.step, "epoch": epoch, **result})
        check_finite(result, self.task.metric, f"the evaluation at step {self.step}")
        if result[self.task.metric] > self.best:
            self.best = result[self.task.metric]
            self._write("best", result)
        self.evaluated = self.step
        if self.accelerator.is_main_process:
            self.checkpoints.amend(self.step, {"best": self.best, "evaluated": self.evaluated})
        return result

    # ---------------------------------------------------------------------------------------------- checkpoints

    def _weights(self) -> dict[str, dict[str, Any]]:
        """State dicts by name. With FSDP, rank 0 has the full ones and the other ranks have none."""
        named = {"model": get_model_state_dict(self.model, options=WHOLE)}
        if self.ema is not None:
            named["ema"] = self.ema.module.state_dict()
        return named

    def _write(self, name: str, metrics: dict[str, float] | None = None) -> None:
        """Write out/name.safetensors with the averaged (EMA) weights if there are any, else those of the model."""
        named, path = self._weights(), self.out / f"{name}.safetensors"
        if self.accelerator.is_main_process:
            card = self.task.card()
            card.step, card.metrics = self.step, metrics or {}
            with writing("out", path):
                save_weights(path, named.get("ema", named["model"]), card)

    def _save(self) -> None:
        loss = self._total_loss()
        self._check_weights()
        weights = self._weights()
        optimizer = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=WHOLE)
        if not self.accelerator.is_main_process:
            return
        scaler, data = self.accelerator.scaler, self.task.data
        state = {
            "step": self.step, "evaluated": self.evaluated, "best": self.best if math.isfinite(self.best) else None,
            "world": self.world, "loss_sum": loss, "loss_count": self.loss_count,
            "scaler": scaler.state_dict() if scaler else None, "recipe": self.recipe.to_dict(),
            "classes": list(data.classes), "samples": data.samples,
        }  # fmt: skip
        card = self.task.card()
        card.step = self.step
        self.checkpoints.save(self.step, card, weights, dict(optimizer), state)

    def _load(self, path: Path) -> None:
        weights, optimizer, state = self.checkpoints.load(path)
        check_same_run(path, state, self.recipe, self.world, self.task.data)
        try:
            values: dict[str, Any] = dict(weights["model"])
            set_state_dict(
                self.model, self.optimizer.optimizer,
                model_state_dict=values, optim_state_dict=optimizer, options=WHOLE,
            )  # fmt: skip
            if self.ema is not None:
                self.ema.module.load_state_dict(weights["ema"])
        except (RuntimeError, KeyError) as error:
            raise UsageError(f"resume: {path} is not of this model: {str(error).splitlines()[-1].strip()}") from error
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.evaluated = state["step"], state["evaluated"]
        self.best = -math.inf if state["best"] is None else state["best"]
        self.loss_sum, self.loss_count = torch.full_like(self.loss_sum, state["loss_sum"]), state["loss_count"]


def train(recipe: Recipe, resume: bool = False) -> dict[str, float]:
    """Run a recipe; writes checkpoints, ``best.safetensors``, ``last.safetensors`` and logs to ``recipe.out``.

    Args:
        resume: continue from the newest checkpoint in ``recipe.out``, if there is one.

    Returns the metrics of the last evaluation, and ``best``, the best value of the task's main metric.

    Raises:
        UsageError: invalid settings or data, a folder with checkpoints without `resume`, a checkpoint of another run,
            or a loss that is not finite.
    """
    run = Run(recipe, resume)
    result = run.fit()
    run.accelerator.end_training()
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train. Under torchrun or accelerate launch: on many devices."
    parser.add_argument("--config", default="", help="a .toml or .yaml recipe, or the name of one that comes along")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, if any")
    parser.add_argument("--show", action="store_true", help="print the settings and stop")
    add_settings(parser)


def run(options: argparse.Namespace) -> None:
    """Train and print the metrics."""
    recipe = from_options(options.config, options)
    if options.show:
        print(json.dumps(recipe.to_dict(), indent=1))
        return
    # a resumed run must use the same forms of layers: none may be chosen by timing
    os.environ.setdefault(calibration.ENVIRONMENT, "off")
    result = train(recipe, options.resume)
    if os.environ.get("RANK", "0") == "0":
        print("  ".join(f"{name} {value:.4f}" for name, value in result.items()))
