"""Losses that are not finite: leave the step out on all ranks alike, or end the run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from acmix.checkpoint.layout import list_checkpoints, step_of
from acmix.engine.learner import Learner
from acmix.engine.progress import Progress, brief, is_finite
from acmix.engine.session import Session
from acmix.process.program import ReportedElsewhere, RunFailure

if TYPE_CHECKING:
    from acmix.data.loader import Batch


class NonFiniteGuard:
    """Leaves out the steps whose loss is not finite on some rank, up to `run.skip_nonfinite` of them in a run.

    The forward pass of such a step spoils the statistics of batch norm too. So where steps may be left out, the model's
    buffers are kept before each step, and put back when it is left out.
    """

    def __init__(self, limit: int, learner: Learner, session: Session) -> None:
        self.limit = limit
        self.learner = learner
        self.session = session
        self._kept: list[Tensor] = []

    def keep_buffers(self) -> None:
        """Remember the model's buffers; call it before the forward pass of a step."""
        if self.limit > 0:
            self._kept = [buffer.clone() for buffer in self.learner.model.buffers()]

    def leave_out(self, batches: Sequence["Batch"], losses: Tensor, progress: Progress) -> None:
        """Leave out the step after `progress.step`: no rank updates its weights. All ranks call this together.

        Args:
            batches: this rank's micro-batches.
            losses: their losses, (M,).
            progress: counts the step as skipped.

        Raises RunFailure naming ranks and samples when the run has no such step left; ReportedElsewhere on other ranks.
        """
        step = progress.step + 1
        ids = [batch.ids.tolist() for batch, loss in zip(batches, losses, strict=True) if not torch.isfinite(loss)]
        samples_of = self.session.dist.gather([index for batch in ids for index in batch])
        found = [{"rank": rank, "samples": samples} for rank, samples in enumerate(samples_of) if samples]
        where = "; ".join(f"rank {item['rank']}, samples {brief(item['samples'])}" for item in found)
        message = f"the loss is not finite at step {step} on {where}"
        progress.skipped += 1
        if progress.skipped > self.limit:
            raise self._failure(
                f"{message}. No rank updated its weights. {self._last_checkpoint(progress.step)}. Lower optimizer.lr, "
                "use bf16 instead of fp16, set optimizer.clip_grad, or leave such updates out with run.skip_nonfinite=N"
            )
        self.session.log.line(f"warning: {message}; no rank updated its weights")
        row = {"epoch": progress.epoch + 1, "step": step, "skipped": progress.skipped, "ranks": found}
        self.session.log.event("skip", row)
        self.learner.discard()
        self._restore_buffers()

    @torch.no_grad()
    def _restore_buffers(self) -> None:
        for buffer, before in zip(self.learner.model.buffers(), self._kept, strict=True):
            buffer.copy_(before)

    def refuse_end(self, progress: Progress) -> None:
        """Raise as `leave_out` does where the last evaluation of a complete run says that the weights have diverged."""
        last = progress.history[-1] if progress.history else {}
        if not is_finite(last):
            raise self._failure(
                f"the run ends at step {progress.step} with an evaluation whose loss is {last['loss']}: the weights "
                f"have diverged. {self._last_checkpoint(progress.step)}. Lower optimizer.lr or set optimizer.clip_grad"
            )

    def _failure(self, message: str) -> Exception:
        return RunFailure(message) if self.session.dist.is_main else ReportedElsewhere(RunFailure.status)

    def _last_checkpoint(self, step: int) -> str:
        """For a message about the loss of the weights after `step` steps: where to go on from. On rank 0."""
        if not self.session.dist.is_main:
            return ""
        self.session.store.wait()
        last = self.session.store.newest()
        if last is None or step_of(last.name) != step:
            return f"Last good checkpoint: {last or 'none yet'}"
        older = [(number, path) for number, path in list_checkpoints(last.parent) if number < step]
        before = f"to go back, --resume {max(older)[1]}" if older else "there is none before it"
        return f"Last checkpoint: {last}, of the weights that gave this loss; {before}"
