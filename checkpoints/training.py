"""The training loop of the demo checkpoints: AdamW, warm-up and cosine, as many steps as the time allows."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """What a training is made with; written to TRAINING.json as it is."""

    batch: int
    """Windows a step."""
    length: int
    """Tokens a window."""
    steps: int | None
    """Steps, or None: as many as the time allows."""
    learning_rate: float = 4e-3
    """At its peak; the cosine ends at one hundredth of it."""
    warmup: int = 200
    """Steps of linear warm-up; a fifth of the steps where there are fewer than a thousand."""
    weight_decay: float = 0.1
    """On matrices; not on norms, biases, A_log and D."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """Largest norm of the gradient."""
    evaluations: int = 20
    """Validations on the way, at least 50 steps apart; the best weights among them are kept."""
    validation_tokens: int | None = None
    """So many of the validation files' tokens, None: all."""
    seed: int = 0


def rate_at(step: int, steps: int | None, settings: Settings) -> float:
    """Learning rate of a step. `steps` may be unknown (None) as long as the warm-up lasts."""
    warmup = settings.warmup if steps is None else min(settings.warmup, max(1, steps // 5))
    if steps is None or step < warmup:
        return settings.learning_rate * min(1.0, (step + 1) / warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_for(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        exempt = name.endswith(("A_log", ".D", "bias")) or "norm" in name
        groups[parameter.ndim >= 2 and not exempt].append(parameter)
    decays = [
        {"params": groups[True], "weight_decay": settings.weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(decays, lr=settings.learning_rate, betas=settings.betas, fused=fused)


def loss_of(model: nn.Module, rows: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy, nats, of rows (b, L + 1) of token ids: of each token after the first."""
    logits = model(rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def validation_loss(model: nn.Module, tokens: Tensor, settings: Settings) -> float:
    """Mean cross-entropy, nats a token, over consecutive windows of `length`, each from an empty state."""
    rows = tokens[: settings.validation_tokens].unfold(0, settings.length + 1, settings.length)
    model.eval()
    total = sum(loss_of(model, part, "sum").double() for part in rows.split(settings.batch))
    model.train()
    return float(total) / (len(rows) * settings.length)


def sample_rows(tokens: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """(batch, length + 1) token ids from random places of the text."""
    places = torch.randint(
        len(tokens) - settings.length, (settings.batch, 1), generator=generator, device=tokens.device
    )
    return tokens[places + torch.arange(settings.length + 1, device=tokens.device)]


class Training:
    """One training: `run` it, then the model holds the weights of the lowest validation loss.

    Attributes:
        steps: of the schedule; None until they are chosen from the time that steps 20 to 60 take.
        done: steps taken. best_step: the one whose weights were kept. seconds: that `run` took.
        curve: a row for each validation: step, train (mean since the row before), validation; nats a token.
    """

    def __init__(
        self, model: nn.Module, train: Tensor, validation: Tensor, settings: Settings, deadline: float
    ) -> None:
        """The token tensors, (n,) int64, are on the model's device; `deadline` is a `time.time()`."""
        self.model, self.train, self.validation = model, train, validation
        self.settings, self.deadline = settings, deadline
        self.steps = settings.steps
        self.done, self.best_step, self.seconds = 0, 0, 0.0
        self.curve: list[dict[str, float]] = []
        self._optimizer = optimizer_for(model, settings)
        self._generator = torch.Generator(train.device).manual_seed(settings.seed)
        self._best: dict[str, Tensor] = {}
        self._total, self._counted = torch.zeros((), device=train.device), 0
        self._measured_from = 0.0

    def run(self) -> None:
        """Train until the steps or the time are used up, then restore the best weights."""
        started = time.time()
        while self.steps is None or self.done < self.steps:
            self._step()
            if self.steps is None:
                self._choose_steps()
            elif self.done % max(50, self.steps // self.settings.evaluations) == 0 or self.done == self.steps:
                self._validate(started)
                if time.time() > self.deadline and self.settings.steps is None:
                    print("  out of time: stopped before the end of the schedule", flush=True)
                    break
        self.model.load_state_dict(self._best)
        self.seconds = time.time() - started

    def _step(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate_at(self.done, self.steps, self.settings)
        loss = loss_of(self.model, sample_rows(self.train, self.settings, self._generator))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._total += loss.detach()
        self._counted += 1
        self.done += 1
        if self.done % 100 == 0:
            print(f"  step {self.done} of {self.steps or '?'}: loss {loss.item():.3f}", flush=True)

    def _choose_steps(self) -> None:
        if self.done == 20:
            float(self._total)  # waits for the device
            self._measured_from = time.time()
        elif self.done == 60:
            float(self._total)
            now = time.time()
            step = (now - self._measured_from) / 40
            self.steps = self.done + max(self.settings.evaluations, int(0.95 * (self.deadline - now) / step))
            print(f"  {step * 1e3:.1f} ms a step: {self.steps} steps", flush=True)

    def _validate(self, started: float) -> None:
        train = float(self._total) / self._counted
        self._total.zero_()
        self._counted = 0
        validation = validation_loss(self.model, self.validation, self.settings)
        if not math.isfinite(train + validation):
            raise RuntimeError(f"the loss of step {self.done} is not finite; lower --learning-rate")
        if all(validation < row["validation"] for row in self.curve):
            self.best_step = self.done
            self._best = {name: x.detach().clone() for name, x in self.model.state_dict().items()}
        self.curve.append({"step": self.done, "train": round(train, 4), "validation": round(validation, 4)})
        seconds = time.time() - started
        print(
            f"  step {self.done} of {self.steps}: train {train:.3f}, validation {validation:.3f} "
            f"after {seconds:.0f} s ({seconds / self.done * 1e3:.1f} ms a step)",
            flush=True,
        )
