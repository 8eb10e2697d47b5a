"""The steps of a healing, through accelerate: one process or many, a CPU or GPUs."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from transmla.errors import TransmlaError
from transmla.heal.batches import Batches
from transmla.heal.distributed import gather
from transmla.heal.optimiser import highest_rate, set_rates
from transmla.heal.resume import State, Store
from transmla.heal.settings import Healing
from transmla.reporter import Reporter

# A loss that is no number sends the run back to its last state, at half the rate, so many times.
MOST_ROLLBACKS = 5


class Loop:
    """A prepared student, its optimiser and text, and where they stand."""

    def __init__(
        self,
        accelerator: Any,
        model: Any,
        optimiser: Any,
        batches: Batches,
        settings: Healing,
        state: State,
        store: Store,
        trainable: set[str],
    ) -> None:
        """``trainable``: names, in the model as it was before accelerate wrapped it, of what may change."""
        self.accelerator, self.model, self.optimiser = accelerator, model, optimiser
        self.batches, self.settings, self.state, self.store = batches, settings, state, store
        self.trainable = trainable
        self.best: dict[str, Tensor] | None = None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.saved_at = -1

    def run(self, report: Reporter) -> None:
        """Learn until the tokens or the minutes are spent, or nothing is gained any more."""
        settings, state = self.settings, self.state
        steps = math.ceil(settings.max_tokens / (settings.batch * settings.length))
        report.stage("healing", steps)
        began = time.monotonic() - state.seconds
        if not state.curve:
            self._look(0.0)
            self._save()
        rate, highest = 0.0, highest_rate(settings, state.curve[0]["held_out_kl"])
        while state.step < steps:
            progress = self._progress(steps)
            if progress >= 1:
                report.message(f"stopped after {settings.max_minutes} minutes")
                break
            if settings.patience is not None and state.looks_without_gain >= settings.patience:
                report.message(f"stopped at step {state.step}: no gain in {settings.patience} looks")
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
            if state.step % settings.eval_every == 0:
                self._look(rate)
            if state.step % settings.save_every == 0:
                self._save()
            report.advance(state.step, f"KL {state.curve[-1]['held_out_kl']:.4f}")
        if state.curve[-1]["step"] != state.step:
            self._look(rate)
        self._save()
        if state.best_step == 0:
            report.message("no look was better than the first: try more tokens, or a lower --learning-rate")

    def _progress(self, steps: int) -> float:
        """Share of the budget that is spent: of tokens, or of minutes if these end first."""
        spent = self.state.step / steps
        if self.settings.max_minutes is not None:
            # The first process's clock is everybody's: all must stop at the same step.
            spent = max(spent, self._from_main(self.state.seconds / (60 * self.settings.max_minutes)))
        return spent

    def _from_main(self, value: float) -> float:
        from accelerate.utils import broadcast_object_list

        return value if self.accelerator.num_processes == 1 else broadcast_object_list([value])[0]

    def _step(self, rows: Tensor) -> float:
        """One step on ``rows`` [batch, length], of which this process takes its part; returns the mean loss."""
        accelerator, parts = self.accelerator, self.settings.accumulate
        each = len(rows) // accelerator.num_processes
        mine = rows[accelerator.process_index * each : (accelerator.process_index + 1) * each]
        total = torch.zeros((), device=accelerator.device)
        self.model.train()
        for micro in mine.to(accelerator.device).chunk(parts):
            with accelerator.accumulate(self.model):
                loss, _ = self.model(micro)
                accelerator.backward(loss)
            total += loss.detach() / parts
        norm = accelerator.clip_grad_norm_(self.parameters, self.settings.clip)
        found = float(accelerator.reduce(total, "mean"))
        # A gradient that is no number would spoil the weights although the loss is one. (DeepSpeed has stepped
        # already; what it spoiled is read again from the last state.)
        if math.isfinite(found) and math.isfinite(float(norm)):
            self.optimiser.step()
        else:
            found = math.nan
        self.optimiser.zero_grad()
        return found

    @torch.no_grad()
    def held_out_kl(self) -> float:
        """Mean KL(teacher ‖ student) on what was kept aside."""
        accelerator, rows = self.accelerator, self.batches.held_out()
        micro = max(1, self.settings.batch // accelerator.num_processes // self.settings.accumulate)
        self.model.eval()
        total = torch.zeros(2, device=accelerator.device)
        for start in range(0, len(rows), micro * accelerator.num_processes):
            first = start + micro * accelerator.process_index
            mine = rows[first : first + micro]
            # All processes run the model equally often; one that has nothing left does it for nothing.
            weight = len(mine)
            _, kl = self.model((mine if weight else rows[:1]).to(accelerator.device))
            total += torch.stack([kl.float() * weight, torch.tensor(float(weight), device=kl.device)])
        total = accelerator.reduce(total, "sum")
        return float(total[0] / total[1])

    def _look(self, rate: float) -> None:
        """Measure, note it, and keep the weights if they are the best so far."""
        state, kl = self.state, self.held_out_kl()
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
        told = {name: value for name, value in point.items() if name != "step" and value is not None}
        self.accelerator.log(told, step=state.step)
        if state.best_kl is None or kl < state.best_kl:
            state.best_kl, state.best_step, state.looks_without_gain = kl, state.step, 0
            found = gather(self.accelerator, self.model, self.trainable)
            self.best = {name.removeprefix("student."): found[name] for name in sorted(found)}
        else:
            state.looks_without_gain += 1

    def _save(self) -> None:
        if self.saved_at != self.state.step:
            self.accelerator.save_state(str(self.store.states(self.state.step)))
        if self.accelerator.is_main_process:
            self.store.save(self.state, self.best)
        self.accelerator.wait_for_everyone()
        self._saved()

    def _saved(self) -> None:
        """After a state was written or read."""
        self.saved_at = self.state.step
        if self.state.step == 0:
            # Sharded optimisers take a step of nothing to have moments to save, which the first real one must not see.
            self.optimiser.state.clear()

    def restore(self) -> None:
        """Go on from what was saved."""
        self.accelerator.load_state(str(self.store.states(self.state.step)))
        self.best = self.store.best(self.state) if self.accelerator.is_main_process else {}
        self._saved()

    def _roll_back(self, report: Reporter) -> None:
        """After a loss that is no number: back to the last state, at half the rate."""
        failed, seconds = self.state.step, self.state.seconds
        rollbacks, slowed = self.state.rollbacks + 1, self.state.slowed / 2
        if rollbacks > MOST_ROLLBACKS:
            raise TransmlaError(
                f"the loss is no number at step {failed}, after {MOST_ROLLBACKS} lowered rates",
                limit="weights or text make the models overflow",
                remedy="lower --learning-rate, or --precision no",
            )
        saved = self.store.read(self.state.key)
        assert saved is not None
        vars(self.state).update(vars(saved))
        # What went wrong took its time too.
        self.state.rollbacks, self.state.slowed, self.state.seconds = rollbacks, slowed, seconds
        self.restore()
        if self.accelerator.is_main_process:
            self.store.save(self.state, self.best)
        report.message(f"the loss was no number at step {failed}: back to step {self.state.step} at half the rate")
