"""The training loop: updates, evaluations, checkpoints, and an orderly end whatever ends it.

One loop serves one process and many. At each step boundary all ranks agree, in one small collective, on the loss, on
whether any of them holds a loss that is not finite, and on whether any was asked to stop.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from acmix.checkpoint.store import Snapshot
from acmix.config import Config
from acmix.data.loader import Batch, Data, SkippedImages
from acmix.data.workers import explain_worker_death
from acmix.engine.evaluate import Metrics, evaluate
from acmix.engine.learner import Learner
from acmix.engine.meter import Meter
from acmix.engine.progress import Progress, brief, refuse_other_run, run_fingerprint
from acmix.engine.session import Session
from acmix.errors import UserError
from acmix.process.distributed import Verdict
from acmix.process.environment import describe
from acmix.process.exits import DONE, REQUEUE
from acmix.process.program import ReportedElsewhere, RunFailure
from acmix.process.signals import StopSignals
from acmix.telemetry.probes import find_probes


class Trainer:
    """Trains to the end of the schedule, or to the next step boundary after a signal.

    Args:
        config: the run's config.
        learner: the model and what moves its weights.
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
        self.probes = find_probes(config.run.probes)
        self.updates_per_epoch = data.train.updates_per_epoch
        whole = config.schedule.epochs * self.updates_per_epoch
        self.total_updates = min(whole, config.schedule.steps or whole)
        self._saved_at: tuple[int, int] | None = None
        self._problem: UserError | None = None
        self._reserved = False

    def resume(self, snapshot: Snapshot) -> None:
        """Continue from a checkpoint. UserError when it belongs to another network, data set, seed or global batch."""
        saved = snapshot.progress
        refuse_other_run(saved, run_fingerprint(self.config, self.data, self.dist.world_size))
        self.learner.load(snapshot.model, snapshot.ema, snapshot.training)
        self.progress = Progress(**{key: saved[key] for key in asdict(Progress())})
        self._saved_at = (self.progress.step, self.progress.epoch)

    def fit(self) -> int:
        """Train; returns the exit status: 0 when the schedule is complete, 75 when a signal stopped the run.

        Raises RunFailure for a loss that is not finite and for a loader process that died, UserError for a checkpoint
        that cannot be written; on the ranks that do not report it, ReportedElsewhere.
        """
        try:
            return self._run()
        except RuntimeError as error:
            raise explain_worker_death(error) or error from None

    def _run(self) -> int:
        self._log_start()
        status = self._fit()
        self.session.finish(status, self._outcome())
        return status

    def _fit(self) -> int:
        if self._poll():
            return self._suspend()
        complete = self._is_complete()
        while not complete:
            stopped = self._train_epoch()
            if stopped or not self._finish_epoch():
                return self._suspend()
            complete = self.progress.step >= self.total_updates
        self._settle()
        return DONE

    def _is_complete(self) -> bool:
        """Whether a resumed run has nothing left to do: a run killed after its last save was evaluated already."""
        progress = self.progress
        evaluated = bool(progress.history) and progress.history[-1]["step"] == progress.step
        return progress.step >= self.total_updates and (evaluated or progress.update_in_epoch == 0)

    def _train_epoch(self) -> bool:
        """Train what is left of the epoch; returns whether a stop was agreed on."""
        progress = self.progress
        if progress.step >= self.total_updates:
            return False
        updates = self.data.train.epoch(progress.epoch, start_update=progress.update_in_epoch)
        self.learner.model.train()
        self.meter.restart()
        shown = self.session.log.progress(
            self.meter.timed(updates),
            total=self.updates_per_epoch,
            initial=progress.update_in_epoch,
            description=f"epoch {progress.epoch + 1}/{self.config.schedule.epochs}",
        )
        for batches in shown:
            verdict = self._train_update(batches)
            if verdict.stop:
                return True
            if progress.step >= self.total_updates:
                break
            if self._checkpoint_due():
                self._save()
            self.dist.watchdog.tick(progress.step + 1, "loading data")
        return False

    def _train_update(self, batches: Sequence[Batch]) -> Verdict:
        progress, learner = self.progress, self.learner
        step = progress.step + 1
        log_row = step % self.config.run.log_every == 0 or progress.update_in_epoch + 1 == self.updates_per_epoch
        buffers = self._copy_buffers()
        losses = learner.gradients(batches, step)
        mean = losses.mean().item()
        messages = [message for batch in batches for message in batch.errors]
        verdict = self._agree(loss=mean, bad=not math.isfinite(mean), unread=len(messages))
        if verdict.unread:
            self._count_unread(step, messages)
        norm = None
        if verdict.bad_ranks:
            self._skip_or_fail(step, batches, losses)
            learner.discard()
            self._restore_buffers(buffers)
        else:
            norm = learner.update(step, measure=log_row)
            self._reserve_once()
        progress.step = step
        progress.update_in_epoch += 1
        self.meter.count()
        if log_row and not verdict.bad_ranks:
            self._log_train(verdict.loss, norm)
        else:
            self._log_paths(logged=False)
        return verdict

    def _finish_epoch(self) -> bool:
        """Evaluate, save, go to the next epoch; returns False when a stop was agreed on during the evaluation."""
        progress, run = self.progress, self.config.run
        self.learner.share_buffers()
        last = progress.step >= self.total_updates
        improved = False
        if last or (progress.epoch + 1) % run.eval_every == 0:
            precision = self.config.precision
            metrics = evaluate(
                self.learner.averaged, self.data.val, self.dist, precision, step=progress.step, poll=self._poll
            )
            if metrics is None:
                return False
            improved = self._record_evaluation(metrics)
        self._log_paths(echo=True)
        if progress.update_in_epoch == self.updates_per_epoch:  # schedule.steps may end within an epoch
            progress.epoch += 1
            progress.update_in_epoch = progress.unread = 0
        self._save(best=improved)
        return True

    def _record_evaluation(self, metrics: Metrics) -> bool:
        """Log an evaluation and keep it; returns whether it is the best so far."""
        progress = self.progress
        row = {"epoch": progress.epoch + 1, "step": progress.step, **metrics}
        self.session.log.eval(row)
        progress.history.append(row)
        improved = progress.best is None or metrics["top1"] > progress.best["top1"]
        if improved:
            progress.best = row
        return improved

    def _log_train(self, loss: float, norm: Tensor | None) -> None:
        progress = self.progress
        row = {
            "epoch": progress.epoch + 1,
            "epochs": self.config.schedule.epochs,
            "step": progress.step,
            "steps": self.total_updates,
            "loss": loss,
            "lr": self.learner.lr,
            **self.meter.read(self.total_updates - progress.step),
        }
        if norm is not None:
            row["grad_norm"] = norm.item()
        self.session.log.train(row)
        self._log_paths()

    def _log_start(self) -> None:
        self.session.log.start(
            {
                "config": self.config.model_dump(mode="json"),
                "parameters": self.learner.parameters,
                "steps": self.total_updates,
                **describe(self.dist.device, self.dist.world_size),
            }
        )
        self._log_paths(echo=True)

    def _log_paths(self, *, echo: bool = False, logged: bool = True) -> None:
        """Log what the probes measure: all of them with `echo`, else those that are due at this step."""
        if not self.dist.is_main:
            return
        step = self.progress.step
        for probe in self.probes:
            if echo or probe.is_due(step, logged=logged):
                self.session.log.probe(probe.name, step, probe.rows(self.learner.model), echo=echo)

    def _agree(self, *, loss: float = 0.0, bad: bool = False, unread: int = 0) -> Verdict:
        """The collective of a step boundary. A rank that cannot go on (a save failed) ends all of them here."""
        if self.dist.is_main:
            self._attempt(self.session.store.poll)
        verdict = self.dist.agree(
            loss=loss, bad=bad, unread=unread, stop=self.signals.requested, give_up=self._problem is not None
        )
        if verdict.give_up:
            raise self._problem or ReportedElsewhere(2)
        return verdict

    def _poll(self) -> bool:
        return self._agree().stop

    def _count_unread(self, step: int, messages: list[str]) -> None:
        """Log images that were left out; too many in an epoch end the run, on all ranks alike."""
        images = [message for rank in self.dist.gather(messages) for message in rank]
        skipped = SkippedImages(self.config, self.progress.unread)
        for image in images:
            self.session.log.line(f"warning: left out at step {step}: {image}")
        row = {"epoch": self.progress.epoch + 1, "step": step, "count": len(images), "images": images}
        self.session.log.event("unread", row)
        self.dist.all_or_none(lambda: skipped.add(len(images)))
        self.progress.unread = skipped.count

    def _skip_or_fail(self, step: int, batches: Sequence[Batch], losses: Tensor) -> None:
        """No rank updates its weights when any holds a loss that is not finite: leave the update out, or stop."""
        bad = [batch.ids.tolist() for batch, loss in zip(batches, losses, strict=True) if not torch.isfinite(loss)]
        ids = [index for batch in bad for index in batch]
        found = [{"rank": rank, "samples": samples} for rank, samples in enumerate(self.dist.gather(ids)) if samples]
        where = "; ".join(f"rank {item['rank']}, samples {brief(item['samples'])}" for item in found)
        message = f"the loss is not finite at step {step} on {where}"
        self.progress.skipped += 1
        if self.progress.skipped > self.config.run.skip_nonfinite:
            raise self._non_finite(message)
        self.session.log.line(f"warning: {message}; no rank updated its weights")
        row = {"epoch": self.progress.epoch + 1, "step": step, "skipped": self.progress.skipped, "ranks": found}
        self.session.log.event("skip", row)

    def _non_finite(self, message: str) -> Exception:
        if not self.dist.is_main:
            return ReportedElsewhere(RunFailure.status)
        self.session.store.wait()
        last = self.session.store.newest() or "none yet"
        return RunFailure(
            f"{message}. No rank updated its weights. Last good checkpoint: {last}. Lower optimizer.lr, use bf16 "
            "instead of fp16, set optimizer.clip_grad, or leave such updates out with run.skip_nonfinite=N"
        )

    def _copy_buffers(self) -> list[Tensor]:
        """A forward pass with bad numbers spoils batch norm's statistics too; only kept where a step may be skipped."""
        if self.config.run.skip_nonfinite == 0:
            return []
        return [buffer.clone() for buffer in self.learner.model.buffers()]

    @torch.no_grad()
    def _restore_buffers(self, buffers: list[Tensor]) -> None:
        for buffer, before in zip(self.learner.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _checkpoint_due(self) -> bool:
        every = self.config.run.checkpoint_every
        progress = self.progress
        at_end_of_epoch = progress.update_in_epoch == self.updates_per_epoch  # saved after its evaluation
        return every > 0 and progress.step % every == 0 and not at_end_of_epoch

    def _save(self, *, best: bool = False) -> None:
        """Save on rank 0. A failure ends all ranks at their next agreement, not this one alone."""
        self.dist.watchdog.tick(self.progress.step, "saving")
        if self.dist.is_main:
            self._attempt(lambda: self._write(best))
        self._saved_at = (self.progress.step, self.progress.epoch)
        self.meter.restart()

    def _reserve_once(self) -> None:
        """After the first update the optimizer has its state: get the memory for copies before the first save."""
        if self.dist.is_main and not self._reserved:
            self._reserved = True
            self._attempt(lambda: self.session.store.reserve(self._snapshot()))

    def _write(self, best: bool) -> None:
        self.session.log.sync()
        self.session.store.save(self._snapshot(), best=best)

    def _attempt(self, work: Callable[[], None]) -> None:
        """Do what may fail on rank 0 alone; the first error is raised at the next agreement, when all ranks can end."""
        try:
            work()
        except UserError as error:
            self._problem = self._problem or error

    def _snapshot(self) -> Snapshot:
        learner = self.learner
        return Snapshot(
            model=learner.model.state_dict(),
            ema=None if learner.ema is None else learner.ema.module.state_dict(),
            training=learner.training_state(),
            progress={**asdict(self.progress), **run_fingerprint(self.config, self.data, self.dist.world_size)},
        )

    def _suspend(self) -> int:
        """Save where the run is, unless that is on disk already, and end with the status that asks for a requeue."""
        progress = self.progress
        self.session.log.line(f"Stopping at step {progress.step} on {self.signals.reason}")
        if self._saved_at != (progress.step, progress.epoch):
            self.learner.share_buffers()
            self._save()
        self._settle()
        return REQUEUE

    def _outcome(self) -> dict[str, Any]:
        """What the last row and the summary say of the run."""
        progress = self.progress
        return {
            "step": progress.step,
            "epoch": progress.epoch,
            "best": progress.best,
            "last": progress.history[-1] if progress.history else None,
            "skipped": progress.skipped,
            "parameters": self.learner.parameters,
        }

    def _settle(self) -> None:
        """Wait until the last save is on disk; then no signal can spoil it, and all ranks leave together."""
        if self.dist.is_main:
            self._attempt(self.session.store.wait)
        self._agree()
        self.signals.seal()
        self.dist.barrier()
