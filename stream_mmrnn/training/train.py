"""Train: a recipe and a task -> a checkpoint from which training can resume.

Truncated back-propagation through time over lanes with carried state (see `data`). Whole modalities are hidden at
random. The epoch with the best validation loss is kept; at the end the temperatures of the heads are fitted on the
validation data.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from stream_mmrnn.core.errors import StreamError, UsageError
from stream_mmrnn.training import late_fusion
from stream_mmrnn.training.build import build
from stream_mmrnn.training.checkpoints import load, part, read, save, write
from stream_mmrnn.training.data import Batch, Task, Ticks, batches
from stream_mmrnn.training.heads import loss
from stream_mmrnn.training.metrics import best_threshold
from stream_mmrnn.training.predictor import HEARD, PredictorNetwork
from stream_mmrnn.training.recipe import Recipe
from stream_mmrnn.training.served import hidden, subsets

Progress = Callable[[dict[str, Any]], None]
_ALL_ARE_BETTER = 0.98
"""A smaller set of modalities has to have a smaller loss by this factor: chance favours one of many."""


class TrainingStopped(StreamError):  # noqa: N818 not an error: the user stopped it
    """Stopped before the first epoch was done, so there is no result."""

    exit_code = 3


class Diverged(StreamError):  # noqa: N818 the usual term
    """The loss is not finite; the last good checkpoint still exists."""


def device_of(recipe: Recipe) -> torch.device:
    """The device to train on; a requested GPU that is missing is an error."""
    if recipe.train.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("train.device is `cuda` and torch sees no GPU; use `cpu` or `auto`")
    use = recipe.train.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use else "cpu")


class Tensors:
    """A batch on the device."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        def to(array: Any) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        self.features = {m: to(x) for m, x in batch.features.items()}
        self.present, self.age, self.reset = to(batch.present), to(batch.age_s), to(batch.reset)
        self.targets = {h: to(x) for h, x in batch.targets.items()}
        self.weights = {h: to(x) for h, x in batch.weights.items()}


def hide(batch: Tensors, share: float, generator: torch.Generator) -> None:
    """Modality dropout: hide whole modalities of whole lanes, but never all modalities of a lane."""
    if share <= 0 or batch.present.shape[2] < 2:
        return
    lanes, _, count = batch.present.shape
    keep = torch.rand((lanes, count), generator=generator) >= share
    # keep at least one modality that the lane has
    there = batch.present.amax(1).cpu()
    keep[torch.arange(lanes), (there + 0.5 * torch.rand((lanes, count), generator=generator)).argmax(1)] = True
    keep = keep.to(batch.present.device)
    batch.present = batch.present * keep[:, None, :]
    batch.age = torch.where(keep[:, None, :], batch.age, torch.full_like(batch.age, 10.0))
    # `Tokens` multiplies by `present`, so the features need no change


def losses(predictor: PredictorNetwork, raw: dict[str, Tensor], batch: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses, and the loss of each head."""
    heads = predictor.heads
    heard = raw.pop(HEARD, None)
    each = {
        h.name: loss(h, raw[h.name], heads.standardised(h, batch.targets[h.name]), batch.weights[h.name])
        for h in predictor.recipe.heads
    }
    total = torch.stack([h.weight * each[h.name] for h in predictor.recipe.heads]).sum()
    if heard is not None and predictor.next_token is not None:
        said = predictor.said(batch.features, batch.present)
        total = total + predictor.recipe.events.next_token * predictor.next_token.loss(heard, said, batch.reset)
    return total, each


class Trainer:
    """One training run; after `run`, `predictor` is the network of the best epoch."""

    def __init__(self, recipe: Recipe, task: Task, folder: Path, resume: bool = False) -> None:
        """`folder` is for checkpoints and logs; `resume` continues from its last checkpoint."""
        self.recipe, self.task, self.folder = recipe, task, folder
        self.device = device_of(recipe)
        t = recipe.train
        torch.manual_seed(t.seed)
        self._rng = np.random.default_rng(t.seed)
        self._hiding = torch.Generator().manual_seed(t.seed)
        self.predictor = build(recipe, task, np.random.default_rng(t.seed)).to(self.device)
        kind = torch.optim.AdamW if t.optimizer == "adamw" else torch.optim.Adam
        self._optimizer = kind(self.predictor.parameters(), lr=t.learning_rate, weight_decay=t.weight_decay)
        self._scaler = torch.amp.GradScaler("cuda", enabled=self.device.type == "cuda" and t.mixed_precision)
        self.epoch = 0
        self.best = (math.inf, -1)
        self.stopped = False
        """It was stopped before its last epoch."""
        self.ignored: list[str] = []
        """Modalities without which the validation loss was smaller; the network does not use them."""
        self.history: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        if resume:
            self._resume()

    # ---- one epoch -----------------------------------------------------------------------------------------------

    def _rate(self, share: float) -> float:
        """The learning rate after this share of the run."""
        t = self.recipe.train
        if t.schedule == "constant":
            return t.learning_rate
        if t.schedule == "one_cycle" and share < 0.3:
            return t.learning_rate * (0.05 + 0.95 * share / 0.3)
        done = (share - 0.3) / 0.7 if t.schedule == "one_cycle" else share
        return t.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))

    def _learn(self, steps_before: int, progress: Progress, alive: Callable[[], bool]) -> tuple[float, int] | None:
        """Mean loss and number of steps of one epoch; None if it was stopped during the epoch."""
        t = self.recipe.train
        predictor = self.predictor.train()
        state = None
        total, count = 0.0, 0
        expected = steps_before // self.epoch if self.epoch else self.task.epoch_ticks // (t.batch * t.length)
        mixed = (
            torch.autocast("cuda", torch.bfloat16)
            if self.device.type == "cuda" and t.mixed_precision
            else nullcontext()
        )
        only = self._only()
        for batch in batches(self.task.train(self._rng), self.recipe, t.batch, t.length):
            if not alive():
                return None
            tensors = Tensors(batch, self.device)
            if only is not None:
                tensors.present = tensors.present * only
            hide(tensors, self.recipe.fusion.modality_dropout, self._hiding)
            share = (self.epoch + (min(count / expected, 1.0) if expected else 0.0)) / t.epochs
            for group in self._optimizer.param_groups:
                group["lr"] = self._rate(share)
            with mixed:
                raw, following = predictor(tensors.features, tensors.present, tensors.age, state, tensors.reset)
            raw = {h: x.float() for h, x in raw.items()}
            value, _ = losses(predictor, raw, tensors)
            if not torch.isfinite(value):
                raise Diverged(
                    f"the loss of {self.recipe.name} is {value.item()} in epoch {self.epoch + 1}, step {count + 1}; "
                    f"the last good checkpoint is in {self.folder}; try a smaller train.learning_rate"
                )
            self._optimizer.zero_grad(set_to_none=True)
            self._scaler.scale(value).backward()
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(predictor.parameters(), t.clip)
            self._scaler.step(self._optimizer)
            self._scaler.update()
            state = {k: v.detach() for k, v in following.items()}
            total += value.item()
            count += 1
            progress(
                {
                    "event": "step",
                    "epoch": self.epoch,
                    "epochs": t.epochs,
                    "step": count,
                    "of": expected or None,
                    "loss": total / count,
                    "share": share,
                }
            )
        return total / max(count, 1), count

    def _only(self) -> Tensor | None:
        """[M] of 0 and 1: after a third of the epochs only the modalities that were best by then go on to learn."""
        if not self.recipe.fusion.choose or self.best[1] < 1 or self.epoch < self.recipe.train.epochs / 3:
            return None
        used = next((h["used"] for h in self.history if h["epoch"] == self.best[1] and "used" in h), None)
        if used is None:
            return None
        return torch.tensor([float(name in used) for name in self.recipe.modalities], device=self.device)

    def _choose(self) -> tuple[float, dict[str, Any]]:
        """The validation loss, and what it was used for that: all, unless less is clearly better."""
        names, found = list(self.recipe.modalities), []
        chooses = self.recipe.fusion.choose
        tried = subsets(names, 2) if chooses else [tuple(names)]
        if (only := self._only()) is not None:  # what does not learn any more need not be tried in each epoch
            tried = [tuple(names), tuple(name for name, on in zip(names, only.tolist(), strict=True) if on)]
        for channels in (True, False) if chooses and self.predictor.moved_at else (True,):
            self.predictor.use_channels(channels)
            for used in tried:
                shown = [hidden(t, names, used) for t in self.task.validation]
                found.append((self.validate(shown), {"used": list(used), "channels": channels}))
        best = min(range(len(found)), key=lambda i: found[i][0] * (1.0 if i else _ALL_ARE_BETTER))
        self.predictor.use_channels(True)
        return found[best]

    def validate(self, sequences: Iterable[Ticks]) -> float:
        """The mean loss per tick over sequences."""
        predictor = self.predictor.eval()
        total = weight = 0.0
        state = None
        with torch.no_grad():
            for batch in batches(sequences, self.recipe, self.recipe.train.batch, 4 * self.recipe.train.length):
                tensors = Tensors(batch, self.device)
                raw, state = predictor(tensors.features, tensors.present, tensors.age, state, tensors.reset)
                n = float(sum(w.sum() for w in batch.weights.values()))
                value, _ = losses(predictor, raw, tensors)
                total += value.item() * n
                weight += n
        return total / max(weight, 1.0)

    # ---- the run -------------------------------------------------------------------------------------------------

    def run(self, progress: Progress = lambda _: None, alive: Callable[[], bool] = lambda: True) -> None:
        """Run the remaining epochs, until `alive` is false; an unfinished epoch is discarded.

        Raises:
            Diverged: the loss is not finite.
            TrainingStopped: it was stopped before the first epoch was done.

        """
        t = self.recipe.train
        steps = sum(h["steps"] for h in self.history)
        while self.epoch < t.epochs and alive():
            began = time.monotonic()
            done = self._learn(steps, progress, alive)
            if done is None:
                break
            learned, count = done
            steps += count
            held_out, chosen = self._choose() if self.task.validation else (learned, {})
            if not math.isfinite(held_out):
                raise Diverged(f"the validation loss of {self.recipe.name} is {held_out} in epoch {self.epoch + 1}")
            self.epoch += 1
            row = {
                "epoch": self.epoch,
                "train_loss": learned,
                "validation_loss": held_out,
                "steps": count,
                "learning_rate": self._optimizer.param_groups[0]["lr"],
                **chosen,
                "seconds": time.monotonic() - began,
            }
            self.history.append(row)
            if held_out < self.best[0]:
                self.best = (held_out, self.epoch)
                save(self.predictor, self.folder / "best.safetensors", self.task.origins)
            self._save()
            progress({"event": "epoch", **row, "best": self.best[1]})
            if t.patience and self.epoch - self.best[1] >= t.patience:
                break
        self.stopped = not alive()
        if self.stopped and self.best[1] < 1:
            raise TrainingStopped(f"training {self.recipe.name} was stopped in its first epoch; nothing was saved")
        if self.best[1] > 0:
            best, _ = load(self.folder / "best.safetensors")
            self.predictor.load_state_dict(best.state_dict())
            chosen = self.history[self.best[1] - 1]
            used = chosen.get("used", self.recipe.modalities)
            self.predictor.use_channels(chosen.get("channels", True))
            self.ignored = [name for name in self.recipe.modalities if name not in used]
            self.predictor.ignore(self.ignored)
        if self.task.validation:
            calibrate(self.predictor, self.task.validation, self.device)
        if self.predictor.late_fusion is not None and self.task.late is not None:
            ratio = late_fusion.fit(self.predictor.cpu(), *self.task.late(), self.recipe.train.seed)
            progress({"event": "late_fusion", "loss_ratio": ratio})
            self.predictor.to(self.device)
        if self.task.validation or self.task.late is not None:
            save(self.predictor, self.folder / "best.safetensors", self.task.origins)

    def _save(self) -> None:
        """Write everything that `resume` needs, in a format that cannot run code."""
        tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in self.predictor.state_dict().items()}
        for i, entry in self._optimizer.state_dict()["state"].items():
            for k, v in entry.items():
                tensors[f"optimizer.{i}.{k}"] = torch.as_tensor(v)
        tensors["random.torch"] = torch.get_rng_state()
        tensors["random.hiding"] = self._hiding.get_state()
        facts = {
            "epoch": self.epoch,
            "best": self.best,
            "history": self.history,
            "rng": self._rng.bit_generator.state,
            "scaler": self._scaler.state_dict(),
        }
        write(tensors, self.folder / "last.safetensors", self.recipe, self.task.origins, facts)

    def _resume(self) -> None:
        path = self.folder / "last.safetensors"
        if not path.exists():
            return
        tensors, about = read(path)
        if about["recipe"] != json.loads(msgspec.json.encode(self.recipe)):
            raise UsageError(f"{path} was made with another recipe; train into another folder, or without --resume")
        facts = about["facts"]
        self.predictor.load_state_dict(part(tensors, "model."))
        optimizer = self._optimizer.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part(tensors, "optimizer.").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        self._optimizer.load_state_dict({**optimizer, "state": state})
        torch.set_rng_state(tensors["random.torch"])
        self._hiding.set_state(tensors["random.hiding"])
        self._rng.bit_generator.state = facts["rng"]
        self._scaler.load_state_dict(facts["scaler"])
        self.epoch, self.history = facts["epoch"], facts["history"]
        self.best = (facts["best"][0], facts["best"][1])


def calibrate(predictor: PredictorNetwork, sequences: Iterable[Ticks], device: torch.device) -> None:
    """Fit the temperature of each head on held-out data (Guo et al. 2017): it minimises the log loss.

    For a binary head also choose the threshold with the best balanced accuracy.
    """
    from stream_mmrnn.training.evaluate import collect

    outputs = collect(predictor, sequences, device=device)
    for head in predictor.recipe.heads:
        if head.kind == "regression":
            continue
        raw, target, weight, _ = (torch.from_numpy(x) for x in outputs[head.name][:4])
        if not len(raw):
            continue
        log_temperature = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.LBFGS([log_temperature], lr=0.2, max_iter=60)

        def closure(
            head: Any = head,
            raw: Any = raw,
            target: Any = target,
            weight: Any = weight,
            at: Any = log_temperature,
            optimizer: Any = optimizer,
        ) -> Any:
            optimizer.zero_grad()
            value = loss(head, raw / at.exp(), target, weight)
            value.backward()
            return value

        optimizer.step(closure)
        value = float(log_temperature.detach().exp())
        if math.isfinite(value) and 0.05 < value < 20:
            predictor.heads.temperature(head.name).fill_(value)
        if head.kind == "classification" and head.size == 1:
            scores = torch.sigmoid(raw / predictor.heads.temperature(head.name).cpu())
            found = best_threshold(scores.numpy().ravel(), target.numpy().ravel())
            predictor.heads.threshold(head.name).fill_(min(max(found, 0.0), 1.0))
