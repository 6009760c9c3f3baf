"""Losses that are not finite: leave the step out on all ranks alike, or end the run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from acmix.engine.learner import Learner
from acmix.engine.progress import Progress, brief
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
            raise self._failure(message)
        self.session.log.line(f"warning: {message}; no rank updated its weights")
        row = {"epoch": progress.epoch + 1, "step": step, "skipped": progress.skipped, "ranks": found}
        self.session.log.event("skip", row)
        self.learner.discard()
        self._restore_buffers()

    @torch.no_grad()
    def _restore_buffers(self) -> None:
        for buffer, before in zip(self.learner.model.buffers(), self._kept, strict=True):
            buffer.copy_(before)

    def _failure(self, message: str) -> Exception:
        if not self.session.dist.is_main:
            return ReportedElsewhere(RunFailure.status)
        self.session.store.wait()
        last = self.session.store.newest() or "none yet"
        return RunFailure(
            f"{message}. No rank updated its weights. Last good checkpoint: {last}. Lower optimizer.lr, use bf16 "
            "instead of fp16, set optimizer.clip_grad, or leave such updates out with run.skip_nonfinite=N"
        )
