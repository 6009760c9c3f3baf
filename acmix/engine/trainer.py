"""The training loop: steps, evaluations, checkpoints, and an orderly end whatever ends it.

One loop serves one process and many. At every step all ranks agree, in one small collective, on the loss, on whether
any of them holds a loss that is not finite, and on whether any was asked to stop.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from acmix.checkpoint.grown import PROGRESS
from acmix.checkpoint.snapshot import Snapshot
from acmix.config import Config
from acmix.config.resume import describe_changes, explain_misfit
from acmix.data.advice import advice_on_waiting
from acmix.data.loader import Batch, Data
from acmix.data.workers import worker_deaths_explained
from acmix.engine.ahead import on_device
from acmix.engine.evaluate import Metrics, evaluate
from acmix.engine.forward import network_inputs
from acmix.engine.learner import Learner
from acmix.engine.meter import Meter
from acmix.engine.nonfinite import NonFiniteGuard
from acmix.engine.progress import (
    Progress,
    is_finite,
    out_of_patience,
    refuse_other_run,
    refuse_shorter,
    run_fingerprint,
    total_updates,
)
from acmix.engine.saver import Saver
from acmix.engine.session import Session
from acmix.engine.unreadable import count_unreadable
from acmix.errors import UserError
from acmix.process.distributed import Verdict
from acmix.process.environment import describe_run
from acmix.process.program import DONE, REQUEUE, ReportedElsewhere
from acmix.process.signals import StopSignals
from acmix.telemetry.probes import find_probes


class Trainer:
    """Trains to the end of the schedule, or to the end of the step in which a signal asks for a stop.

    Args:
        config: the run's config.
        learner: the model and what changes its weights.
        data: the training and validation loaders.
        session: this attempt's processes, run folder, log and checkpoints; opened before `fit`.
        signals: stop requests.

    Raises UserError for a probe that does not exist.
    """

    def __init__(self, config: Config, learner: Learner, data: Data, session: Session, signals: StopSignals) -> None:
        self.config = config
        self.learner = learner
        self.data = data
        self.session = session
        self.dist = session.dist
        self.signals = signals
        self.progress = Progress()
        self.meter = Meter(data.train.global_batch, self.dist.device)
        self.saver = Saver(session, self._snapshot)
        self.guard = NonFiniteGuard(config.run.skip_nonfinite, learner, session)
        self.probes = find_probes(config.run.probes, config.paths.every)
        self.steps_per_epoch = data.train.updates_per_epoch
        self.total_steps = total_updates(config.schedule, self.steps_per_epoch)
        self._saved_at: tuple[int, int] | None = None

    def resume(self, snapshot: Snapshot) -> None:
        """Continue from a checkpoint. UserError when it does not fit the config, the data or the processes."""
        saved = snapshot.progress
        refuse_other_run(saved, run_fingerprint(self.config, self.data, self.dist.world_size))
        refuse_shorter(self.config.schedule, saved["step"], self.steps_per_epoch)
        try:
            self.learner.load(snapshot.model, snapshot.ema, snapshot.training)
        except UserError as error:
            raise UserError(explain_misfit(str(error), self.session.changes)) from None
        self.progress = Progress.restore(saved)
        self._saved_at = (self.progress.step, self.progress.epoch)

    @worker_deaths_explained()
    def fit(self) -> int:
        """Train; returns the exit status: 0 when the schedule is complete, 75 when a signal stopped the run.

        Raises RunFailure for a loss that is not finite in a step or in the last evaluation, UserError for a checkpoint
        that cannot be written and for a loader process that died; ReportedElsewhere on ranks that do not report it.
        """
        learner, progress, log = self.learner, self.progress, self.session.log
        self._log_start()
        self._save_if_from_elsewhere()
        stopped = self._asked_to_stop()
        while not (stopped or self._is_complete()):
            learner.model.train()
            self.meter.restart()
            title = f"epoch {progress.epoch + 1}/{self.config.schedule.epochs}"
            done = progress.update_in_epoch
            with log.progress_bar(total=self.steps_per_epoch, initial=done, description=title) as bar:
                for batches in self.meter.timed(self._rest_of_epoch()):
                    stopped = self._train_step(batches).stop
                    bar.advance()
                    if stopped:
                        break
                    if self._checkpoint_due():
                        self._save()
                    self.dist.watchdog.tick(progress.step + 1, "loading data")
            if stopped:
                break

            log.line(*advice_on_waiting(self.meter.epoch_wait, progress.epoch + 1, self.config, self.data.loader))
            learner.share_buffers()
            improved = False
            if self._evaluation_due():
                metrics = self._evaluate()
                if metrics is None:
                    stopped = True
                    break
                improved = self._record_evaluation(metrics)
                self._refuse_diverged_end()
            self._log_probes(echo=True)
            if progress.update_in_epoch == self.steps_per_epoch:  # schedule.steps may end within an epoch
                progress.epoch += 1
                progress.update_in_epoch = progress.unread = 0
            self._save(best=improved)

        if stopped:
            self._save_where_stopped()
        else:
            self._refuse_diverged_end()  # also of a run that was complete when it was resumed
            if self._out_of_patience():
                log.line(f"Ends here by run.patience: {self.config.run.patience} evaluations without a better top-1")
        self._settle()
        status = REQUEUE if stopped else DONE
        self.session.finish(status, self._outcome())
        return status

    def _is_complete(self) -> bool:
        """Whether nothing is left to do: patience is over, or all steps are taken and then the model was evaluated.

        A run that was killed between the two is resumed with the evaluation alone to do.
        """
        progress = self.progress
        evaluated = bool(progress.history) and progress.history[-1]["step"] == progress.step
        complete = progress.step >= self.total_steps and (evaluated or progress.update_in_epoch == 0)
        return complete or self._out_of_patience()

    def _refuse_diverged_end(self) -> None:
        """Raise where all steps are taken and the weights have diverged: the run is not done, and nothing is saved."""
        if self.progress.step >= self.total_steps:
            self.guard.refuse_end(self.progress)

    def _out_of_patience(self) -> bool:
        """Whether the run ends before its last step, because evaluations have stopped getting better."""
        progress = self.progress
        return progress.step < self.total_steps and out_of_patience(self.config.run, progress.history)

    def _rest_of_epoch(self) -> Iterator[list[Batch]]:
        """The batches of each step that is left of the epoch, or of `schedule.steps`, on the device."""
        progress = self.progress
        steps = self.data.train.epoch(progress.epoch, start_update=progress.update_in_epoch)
        left = islice(steps, max(self.total_steps - progress.step, 0))
        return on_device(left, self.dist.device, channels_last=self.config.precision.channels_last)

    def _train_step(self, batches: Sequence[Batch]) -> Verdict:
        """One step on all ranks alike; returns what they agreed on."""
        progress, learner = self.progress, self.learner
        step = progress.step + 1
        last = progress.update_in_epoch + 1 == self.steps_per_epoch or step == self.total_steps
        log_row = last or step % self.config.run.log_every == 0
        self.guard.keep_buffers()
        # a GPU is busy with the backward pass while the ranks agree: it never waits for them
        losses = torch.stack([loss.read() for loss in learner.gradients(batches, step)])
        mean = losses.mean().item()
        unread = [message for batch in batches for message in batch.errors]
        verdict = self._agree(loss=mean, bad=not math.isfinite(mean), unread=len(unread))
        if verdict.unread:
            count_unreadable(unread, self.config.data.max_errors, progress, self.session)
        norm = None
        if verdict.bad_ranks:
            self.guard.leave_out(batches, losses, progress)
        else:
            norm = learner.update(step, measure=log_row)
            self.saver.reserve_once()
        progress.step = step
        progress.update_in_epoch += 1
        self.meter.count()
        if log_row and not verdict.bad_ranks:
            self._log_train(verdict.loss, norm)
        else:
            self._log_probes(logged=False)
        return verdict

    def _evaluation_due(self) -> bool:
        progress = self.progress
        return progress.step >= self.total_steps or (progress.epoch + 1) % self.config.run.eval_every == 0

    def _evaluate(self) -> Metrics | None:
        """Evaluate the network, or its running average; None when a signal asked for a stop meanwhile."""
        model, precision, step = self.learner.averaged, self.config.precision, self.progress.step
        return evaluate(model, self.data.val, self.dist, precision, step=step, poll=self._asked_to_stop)

    def _record_evaluation(self, metrics: Metrics) -> bool:
        """Log an evaluation and keep it; returns whether it is the best so far."""
        progress = self.progress
        row = {"epoch": progress.epoch + 1, "step": progress.step, **metrics}
        self.session.log.eval(row)
        progress.history.append(row)
        improved = is_finite(row) and (progress.best is None or metrics["top1"] > progress.best["top1"])
        if improved:
            progress.best = row
        return improved

    def _log_train(self, loss: float, norm: Tensor | None) -> None:
        progress = self.progress
        row = {
            "epoch": progress.epoch + 1,
            "epochs": self.config.schedule.epochs,
            "step": progress.step,
            "steps": self.total_steps,
            "loss": loss,
            "lr": self.learner.lr,
            **self.meter.read(self.total_steps - progress.step),
        }
        if norm is not None:
            row["grad_norm"] = norm.item()
        self.session.log.train(row)
        self._log_probes()

    def _log_start(self) -> None:
        self.session.log.start(
            {
                "config": self.config.model_dump(mode="json"),
                **({"changed": self.session.changes} if self.session.changes else {}),
                "parameters": self.learner.parameters,
                "steps": self.total_steps,
                **describe_run(self.dist.device, self.dist.world_size),
            }
        )
        self.session.log.line(*describe_changes(self.session.changes))
        self._log_probes(echo=True)

    def _log_probes(self, *, echo: bool = False, logged: bool = True) -> None:
        """Log what the probes measure that are due; `echo` at the start and at the end of each epoch."""
        if not self.dist.is_main:
            return
        step = self.progress.step
        end = (step if self._out_of_patience() else self.total_steps) if echo else None
        for probe in self.probes:
            if probe.is_due(step, logged=logged, end=end):
                rows = probe.rows(self.learner.model, self._given)
                self.session.log.probe(probe.name, step, rows, echo=echo, shown=probe.shown)

    def _given(self, needs: str) -> Any:
        """What a probe measures with; see `Probe.needs`."""
        return self._fixed_images if needs == "images" else self.learner.path_gradients

    @cached_property
    def _fixed_images(self) -> Tensor:
        batches = self.data.val.spread(self.config.paths.images)
        return torch.cat([network_inputs(batch, self.config.precision, self.dist.device)[0] for batch in batches])

    def _agree(self, *, loss: float = 0.0, bad: bool = False, unread: int = 0) -> Verdict:
        """The collective of every step. Where a save has failed on rank 0, all ranks end here."""
        self.saver.poll()
        verdict = self.dist.agree(
            loss=loss, bad=bad, unread=unread, stop=self.signals.requested, give_up=self.saver.problem is not None
        )
        if verdict.give_up:
            raise self.saver.problem or ReportedElsewhere(2)
        return verdict

    def _asked_to_stop(self) -> bool:
        """Whether a signal reached any rank; all of them call it together."""
        return self._agree().stop

    def _checkpoint_due(self) -> bool:
        every, progress = self.config.run.checkpoint_every, self.progress
        # the end of an epoch, or of the run, is saved after its evaluation
        at_end = progress.update_in_epoch == self.steps_per_epoch or progress.step >= self.total_steps
        return every > 0 and progress.step % every == 0 and not at_end

    def _save(self, *, best: bool = False) -> None:
        self.dist.watchdog.tick(self.progress.step, "saving")
        self.saver.save(best=best)
        self._saved_at = (self.progress.step, self.progress.epoch)
        self.meter.restart()

    def _snapshot(self) -> Snapshot:
        learner = self.learner
        return Snapshot(
            model=learner.model.state_dict(),
            ema=None if learner.ema is None else learner.ema.module.state_dict(),
            training=learner.training_state(),
            progress={
                **asdict(self.progress),
                **run_fingerprint(self.config, self.data, self.dist.world_size),
                **({PROGRESS: learner.new} if learner.new else {}),
            },
        )

    def _save_if_from_elsewhere(self) -> None:
        """Save the checkpoint of another folder that this run goes on from: its own folder must do to resume it."""
        progress = self.progress
        if self._saved_at is not None and not self.session.holds(progress.step):
            self._save(best=progress.best is not None and progress.best["step"] == progress.step)
            self.saver.wait()

    def _save_where_stopped(self) -> None:
        """Save the state after the last step, unless that is on disk already."""
        progress = self.progress
        self.session.log.line(f"Stopping at step {progress.step} on {self.signals.reason}")
        if self._saved_at != (progress.step, progress.epoch):
            self.learner.share_buffers()
            self._save()

    def _outcome(self) -> dict[str, Any]:
        """What the last row and the summary say of the run."""
        progress = self.progress
        return {
            "step": progress.step,
            "epoch": progress.epoch,
            "best": progress.best,
            "last": progress.history[-1] if progress.history else None,
            **({"stopped": "patience"} if self._out_of_patience() else {}),
            "skipped": progress.skipped,
            "parameters": self.learner.parameters,
        }

    def _settle(self) -> None:
        """Wait until the last save is on disk; from then on signals are ignored, and all ranks leave together."""
        self.saver.settle()
        self._agree()
        self.signals.seal()
        self.dist.barrier()
