"""Training loop of a healing, through accelerate: one process or many, on CPUs or GPUs."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from transmla.boundary import boundary
from transmla.errors import TransmlaError
from transmla.heal.batches import Batches
from transmla.heal.distributed import from_main, gather
from transmla.heal.learning_rate import highest_rate, set_rates
from transmla.heal.passes import Passes
from transmla.heal.resume import State, Store
from transmla.heal.settings import Healing
from transmla.reporter import Reporter

# Largest number of returns to the last saved state after a NaN or infinite loss, each at half the learning rate.
MOST_ROLLBACKS = 5


class Loop:
    """Training loop over a prepared student, its optimiser and its texts.

    Attributes:
        state: steps, seconds, held-out curve and rollbacks so far.
        best: weights of the evaluation with the lowest held-out KL, by name in the student; None before the first
            evaluation, and empty on all processes but the first.
        saved_at: step of the last saved state; -1 if there is none.
    """

    def __init__(
        self,
        accelerator: Any,
        passes: Passes,
        batches: Batches,
        settings: Healing,
        state: State,
        store: Store,
        trainable: set[str],
    ) -> None:
        """Set up the loop.

        Args:
            accelerator: the accelerator that prepared the model and its optimiser.
            passes: the prepared ``Distiller``, and its optimiser, whose groups have a ``unit``.
            batches: training and held-out sequences.
            settings: options of the healing.
            state: a new state, or the state to resume from.
            store: the folder that states are saved in.
            trainable: names of the trainable parameters before accelerate wrapped the model.
        """
        self.accelerator, self.passes = accelerator, passes
        self.model, self.optimiser = passes.model, passes.optimiser
        self.batches, self.settings, self.state, self.store = batches, settings, state, store
        self.trainable = trainable
        self.best: dict[str, Tensor] | None = None
        self._gathered: dict[str, Tensor] = {}
        self.saved_at = -1

    def run(self, report: Reporter) -> None:
        """Train until the tokens or minutes are used up, or ``patience`` evaluations bring no gain.

        Raises:
            TransmlaError: if the loss is still NaN or infinite after ``MOST_ROLLBACKS`` rollbacks.
        """
        settings, state = self.settings, self.state
        steps = math.ceil(settings.max_tokens / (settings.batch * settings.length))
        # With a limit in minutes, the progress is the used share of whichever budget ends first, in seconds.
        total = steps if settings.max_minutes is None else math.ceil(60 * settings.max_minutes)
        report.stage("healing", total)
        began = time.monotonic() - state.seconds
        if not state.curve:
            self._evaluate(0.0)
            self._save()
        rate, highest = 0.0, highest_rate(settings, state.curve[0]["held_out_kl"])
        while state.step < steps:
            progress = self._progress(steps)
            if progress >= 1:
                report.message(f"stopped after {settings.max_minutes} minutes")
                break
            if settings.patience is not None and state.evaluations_without_gain >= settings.patience:
                report.message(f"stopped at step {state.step}: no gain in {settings.patience} evaluations")
                break
            rate = set_rates(self.optimiser, progress, state.step, highest * state.slowed, settings.warmup)
            loss = self._step(self.batches[state.step])
            if not math.isfinite(loss):
                self._roll_back(report)
                began = time.monotonic() - state.seconds
                continue
            state.losses.append(loss)
            state.step += 1
            state.seconds = time.monotonic() - began
            if state.step % settings.eval_every == 0 and not self._evaluate(rate):
                self._roll_back(report)
                began = time.monotonic() - state.seconds
                continue
            if state.step % settings.save_every == 0:
                self._save()
            report.advance(min(total, round(self._used(steps) * total)), f"KL {state.curve[-1]['held_out_kl']:.4f}")
        if state.curve[-1]["step"] != state.step:
            self._evaluate(rate)
        self._save()
        if state.best_step == 0:
            report.message("no evaluation was better than the first: try more tokens, or a lower --learning-rate")

    def _used(self, steps: int) -> float:
        """Return the used share of the budget: of the tokens or of the minutes, whichever share is larger."""
        used, minutes = self.state.step / steps, self.settings.max_minutes
        return used if minutes is None else max(used, self.state.seconds / (60 * minutes))

    def _progress(self, steps: int) -> float:
        """Return the first process's ``_used``: all processes must stop at the same step, and so use one clock."""
        used = self._used(steps)
        return used if self.settings.max_minutes is None else from_main(self.accelerator, used)

    def _step(self, rows: Tensor) -> float:
        """Train one step on this process's part of ``rows`` [batch, length].

        A step whose loss or gradient is not finite ruins the weights, which a rollback then loads again. So the host
        launches the whole step before it waits for the loss.

        Returns:
            The mean loss over all processes; NaN if the loss or gradient is not finite.
        """
        accelerator = self.accelerator
        size = len(rows) // accelerator.num_processes
        local_rows = rows[accelerator.process_index * size : (accelerator.process_index + 1) * size]
        self.model.train()
        total = self.passes.gradients(local_rows.to(accelerator.device), self.settings.accumulate)
        norm = self.passes.clip(self.settings.clip)
        self.optimiser.step()
        self.passes.clear()
        mean_loss = float(accelerator.reduce(total, "mean"))
        return mean_loss if math.isfinite(float(norm)) else math.nan

    @torch.no_grad()
    def held_out_kl(self) -> float:
        """Return the mean KL(teacher ‖ student) over the held-out sequences, in nats per position."""
        accelerator, rows = self.accelerator, self.batches.held_out()
        micro = max(1, self.settings.batch // accelerator.num_processes // self.settings.accumulate)
        self.model.eval()
        total = torch.zeros(2, device=accelerator.device)
        for start in range(0, len(rows), micro * accelerator.num_processes):
            first = start + micro * accelerator.process_index
            local_rows = rows[first : first + micro]
            # Sharded models need every process in every forward pass. A process without rows runs one with weight 0.
            weight = len(local_rows)
            _, kl = self.model((local_rows if weight else rows[:1]).to(accelerator.device))
            total += torch.stack([kl.float() * weight, torch.tensor(float(weight), device=kl.device)])
        total = accelerator.reduce(total, "sum")
        return float(total[0] / total[1])

    def _evaluate(self, rate: float) -> bool:
        """Measure the held-out KL, add a point to the curve, and keep the weights if they are the best so far.

        Returns:
            Whether the KL is finite. If not, nothing else happens.

        Raises:
            TransmlaError: if the KL of the untrained student is NaN or infinite.
        """
        state, kl = self.state, self.held_out_kl()
        if not math.isfinite(kl) and not state.curve:
            raise TransmlaError(
                "the held-out KL is NaN or infinite before the first step",
                limit="student or teacher overflows on the held-out text",
                remedy="run `transmla verify` on the student, and check the teacher; or pass --precision no",
            )
        if not math.isfinite(kl):
            return False
        point: dict[str, Any] = {
            "step": state.step,
            "tokens": state.step * self.settings.batch * self.settings.length,
            "seconds": round(state.seconds, 3),
            "loss": sum(state.losses) / len(state.losses) if state.losses else None,
            "held_out_kl": kl,
            "rate": rate,
        }
        state.curve.append(point)
        state.losses = []
        logged = {name: value for name, value in point.items() if name != "step" and value is not None}
        self.accelerator.log(logged, step=state.step)
        if state.best_kl is None or kl < state.best_kl:
            state.best_kl, state.best_step, state.evaluations_without_gain = kl, state.step, 0
            self._gathered = gather(self.accelerator, self.model, self.trainable, self._gathered)
            self.best = {name.removeprefix("student."): self._gathered[name] for name in sorted(self._gathered)}
        else:
            state.evaluations_without_gain += 1
        return True

    def _save(self) -> None:
        """Save the models' and optimiser's states, then the pointer to them."""
        if self.saved_at != self.state.step:
            self.accelerator.save_state(str(self.store.states(self.state.step)))
        if self.accelerator.is_main_process:
            self.store.save(self.state, self.best)
        self.accelerator.wait_for_everyone()
        self._after_save_or_load()

    def _after_save_or_load(self) -> None:
        self.saved_at = self.state.step
        if self.state.step == 0:
            # To have moments to save, sharded optimisers take an empty step. The first real step must not see these
            # moments.
            self.optimiser.state.clear()

    def restore(self) -> None:
        """Load model, optimiser, random states and best weights of the saved ``state``.

        Raises:
            TransmlaError: if a file is missing or damaged.
        """
        folder = self.store.states(self.state.step)
        with boundary(f"'{folder}' is damaged", remedy=f"delete '{self.store.folder}' and start again"):
            self.accelerator.load_state(str(folder))
        self.best = self.store.best(self.state) if self.accelerator.is_main_process else {}
        self._after_save_or_load()

    def _roll_back(self, report: Reporter) -> None:
        """Return to the last saved state at half the learning rate, after a NaN or infinite loss."""
        failed, seconds = self.state.step, self.state.seconds
        rollbacks, slowed = self.state.rollbacks + 1, self.state.slowed / 2
        if rollbacks > MOST_ROLLBACKS:
            raise TransmlaError(
                f"the loss is NaN or infinite at step {failed}, although the rate was halved {MOST_ROLLBACKS} times",
                limit="weights or text make the models overflow",
                remedy="lower --learning-rate, or pass --precision no",
            )
        saved = self.store.read(self.state.key)
        assert saved is not None
        vars(self.state).update(vars(saved))
        # The failed steps also count towards --max-minutes.
        self.state.rollbacks, self.state.slowed, self.state.seconds = rollbacks, slowed, seconds
        self.restore()
        if self.accelerator.is_main_process:
            self.store.save(self.state, self.best)
        report.message(
            f"the loss was NaN or infinite at step {failed}: returned to step {self.state.step} at half the rate"
        )
