"""The loop that every task is trained by.

A step is one update of the optimiser: ``accumulate`` passes over ``batch_size`` images in each process. What is random
in a pass depends on the seed, the number of the pass and the process, and on nothing that came before: a resumed run
goes the way that the uninterrupted one would have gone, and no generator's state is kept.
"""

from __future__ import annotations

import math
import random
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_state_dict,
)

from xformer.engine.checkpoint import Checkpoints
from xformer.engine.log import Log
from xformer.engine.task import Task, task_class
from xformer.errors import UsageError
from xformer.files import make_folder
from xformer.recipe import Recipe
from xformer.weights import save_weights, start_from

FREE = {
    "out", "data", "train_shards", "eval_shards", "workers", "threads", "compile", "channels_last", "eval_every",
    "checkpoint_every", "keep", "log_every", "tensorboard", "weights", "partial", "grad_checkpointing",
}  # fmt: skip
"""Settings that a resumed run may change: they do not change where it goes, or only by rounding."""
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def seed_all(*numbers: int) -> None:
    """Python's, numpy's and torch's generators, from a few numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm's mixup draws from it)
    torch.manual_seed(seed)


class Run:
    """One run of a recipe in this process, which may be one of many that torchrun or accelerate has started."""

    def __init__(self, recipe: Recipe, resume: bool = False) -> None:
        from accelerate import Accelerator

        self.recipe, self.out = recipe, Path(recipe.out)
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        # without `cpu`, processes that torchrun has started on a machine without an accelerator are strangers
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
        self.task: Task = task_class(recipe.task)(recipe, self.rank, self.world)
        self.per_epoch = self.task.data.batches_per_epoch // recipe.accumulate
        if self.per_epoch < 1:
            raise UsageError(
                f"batch_size: {self.task.data.train_images} training images make no step of {recipe.accumulate} x "
                f"{recipe.batch_size} images in {self.world} processes"
            )
        self.steps = recipe.epochs * self.per_epoch
        self.step, self.best = 0, -math.inf
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
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2
        from timm.utils import ModelEmaV3

        recipe = self.recipe
        seed_all(recipe.seed)
        model = self.task.build()
        self.said: list[str] = []
        if recipe.weights:
            self.said = start_from(model, self.task.name, recipe.weights, recipe.partial)
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
        try:
            optimizer = create_optimizer_v2(
                model, recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay,
                layer_decay=recipe.layer_decay or None,
            )  # fmt: skip
        except ValueError as error:
            raise UsageError(f"opt must be an optimiser of timm's, got {recipe.opt!r}: {error}") from error
        self.scheduler, _ = create_scheduler_v2(
            optimizer, "cosine", num_epochs=recipe.epochs, min_lr=recipe.min_lr, warmup_lr=recipe.warmup_lr,
            warmup_epochs=recipe.warmup_epochs, step_on_epochs=False, updates_per_epoch=self.per_epoch,
        )  # fmt: skip
        if recipe.compile:
            model.compile()
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    # ------------------------------------------------------------------------------------------------- training

    def fit(self) -> dict[str, float]:
        """Train from where the run is to the end of its epochs.

        Returns the last evaluation's metrics, and the ``best`` of the metric that the task goes by.
        """
        recipe, out = self.recipe, self.out
        main = self.accelerator.is_main_process
        if main:
            make_folder("out", out)
        result: dict[str, float] = {}
        with Log(out, self.step, self.steps, recipe.tensorboard, main) as self.log:
            for said in self.said:
                self.log.say(f"weights: left out: {said}")
            first = self.step // self.per_epoch
            for epoch in range(first, recipe.epochs):
                self._epoch(epoch)
                last = epoch == recipe.epochs - 1
                if last or (epoch + 1) % recipe.eval_every == 0:
                    result = self._evaluate(epoch)
                self._save()
                self.log.say(f"epoch {epoch + 1} of {recipe.epochs}, step {self.step}{self._skipped()}")
        if not result:  # resumed at the end
            result = self.evaluate()
        self._write("last")
        self.accelerator.wait_for_everyone()
        return result | {"best": max(self.best, result[self.task.metric])}

    def _skipped(self) -> str:
        skipped = self.task.data.skipped
        return f", {skipped.count} unreadable images skipped" if skipped.count else ""

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
            every = recipe.checkpoint_every
            if every and self.step % every == 0 and self.step % self.per_epoch:
                self._save()

    def _pass(self, images: Tensor, targets: Any) -> None:
        from accelerate.utils import send_to_device

        images, targets = send_to_device((images, targets), self.device, non_blocking=True)
        images, targets = self.task.mix(images, targets)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.accelerator.accumulate(self.model):
            loss = self.task.loss(self.model(images), targets)
            self.accelerator.backward(loss)
            if self.recipe.clip_grad and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.loss_sum += loss.detach().double()
        self.loss_count += 1

    def _total_loss(self) -> float:
        """Since the last row of the log, the mean over all processes."""
        total = float(self.accelerator.reduce(self.loss_sum.clone(), "mean"))
        if not math.isfinite(total):
            raise UsageError(
                f"lr: the loss is {total} at step {self.step}: take a lower one than {self.recipe.lr}, or clip_grad "
                f"(checkpoints in {self.checkpoints.folder} are from before)"
            )
        return total

    # ----------------------------------------------------------------------------------------------- evaluation

    def _plain(self) -> nn.Module:
        """The model whose weights count: the averaged one where there is one."""
        if self.ema is not None:
            averaged: nn.Module = self.ema.module
            return averaged
        return self.model if self.sharded else self.accelerator.unwrap_model(self.model)

    def evaluate(self) -> dict[str, float]:
        """Metrics of all evaluation images."""
        model, metrics = self._plain(), self.task.metrics(self.device)
        training = model.training
        model.eval()
        try:
            evaluate(
                model,
                self.task,
                metrics,
                self.device,
                self.recipe.channels_last,
                self.accelerator.autocast,
                self.sharded,
            )
        finally:
            model.train(training)
        return metrics.compute()

    def _evaluate(self, epoch: int) -> dict[str, float]:
        if self.world > 1 and not self.sharded:
            from timm.utils import distribute_bn

            for model in (self.accelerator.unwrap_model(self.model), self.ema and self.ema.module):
                if model is not None:
                    distribute_bn(model, self.world, reduce=True)
        result = self.evaluate()
        self.log.add("eval", {"step": self.step, "epoch": epoch, **result})
        if result[self.task.metric] > self.best:
            self.best = result[self.task.metric]
            self._write("best", result)
        return result

    # ---------------------------------------------------------------------------------------------- checkpoints

    def _weights(self) -> dict[str, dict[str, Any]]:
        """State dicts by name. Under FSDP the first process has whole ones and the others have none."""
        named = {"model": get_model_state_dict(self.model, options=WHOLE)}
        if self.ema is not None:
            named["ema"] = self.ema.module.state_dict()
        return named

    def _write(self, name: str, metrics: dict[str, float] | None = None) -> None:
        """out/name.safetensors: the weights that count."""
        named = self._weights()
        if self.accelerator.is_main_process:
            card = self.task.card()
            card.step, card.metrics = self.step, metrics or {}
            save_weights(self.out / f"{name}.safetensors", named.get("ema", named["model"]), card)

    def _save(self) -> None:
        weights, loss = self._weights(), self._total_loss()
        optimizer = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=WHOLE)
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "step": self.step, "best": self.best if math.isfinite(self.best) else None, "world": self.world,
            "loss_sum": loss, "loss_count": self.loss_count, "scaler": scaler.state_dict() if scaler else None,
            "recipe": self.recipe.to_dict(),
        }  # fmt: skip
        card = self.task.card()
        card.step = self.step
        self.checkpoints.save(self.step, card, weights, dict(optimizer), state)

    def _load(self, path: Path) -> None:
        weights, optimizer, state = self.checkpoints.load(path)
        now = self.recipe.to_dict() | {"world": self.world}
        then = state["recipe"] | {"world": state["world"]}
        changed = [key for key in now if key not in FREE and now[key] != then.get(key)]
        if changed:
            key = changed[0]
            raise UsageError(
                f"resume: {path} was made with {key}={then.get(key)!r}, and this run has {now[key]!r}"
                + (f" ({', '.join(changed[1:])} differ too)" if changed[1:] else "")
            )
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
        self.step, self.best = state["step"], -math.inf if state["best"] is None else state["best"]
        self.loss_sum, self.loss_count = torch.full_like(self.loss_sum, state["loss_sum"]), state["loss_count"]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    metrics: Any,
    device: Any,
    channels_last: bool = True,
    autocast: Any = nullcontext,
    together: bool = False,
) -> None:
    """Add this process's share of the evaluation images to `metrics`.

    `together`: a pass forward is a collective (FSDP), so that processes that are done go on with what they had last.
    """
    from accelerate.utils import send_to_device

    batches, batch = task.data.evaluate(), None
    while True:
        following = next(batches, None)
        if together:
            left = torch.tensor(float(following is not None), device=device)
            dist.all_reduce(left)
            if not left:
                return
        elif following is None:
            return
        batch = following or batch
        if batch is None:
            raise UsageError("eval_samples: there are fewer evaluation batches than processes")
        images, targets = send_to_device(batch, device)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast():
            outputs = model(images)
        if following is not None:
            metrics.update(outputs, targets)


def train(recipe: Recipe, resume: bool = False) -> dict[str, float]:
    """Run a recipe: checkpoints, ``best.safetensors``, ``last.safetensors`` and logs in ``recipe.out``.

    Args:
        resume: go on from the newest checkpoint in ``recipe.out``, if there is one.

    Returns the last evaluation's metrics, and the ``best`` so far of the task's.

    Raises:
        UsageError: settings or data that do not work, a folder with checkpoints without `resume`, a checkpoint of
            another run, a loss that is not finite.
    """
    run = Run(recipe, resume)
    result = run.fit()
    run.accelerator.end_training()
    return result
