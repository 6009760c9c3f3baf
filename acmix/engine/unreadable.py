"""Training images left out because they cannot be read (`data.on_error: skip`): logged, counted, limited."""

from acmix.engine.progress import Progress
from acmix.engine.session import Session
from acmix.errors import UserError


def count_unreadable(messages: list[str], limit: int, progress: Progress, session: Session) -> None:
    """Log the images left out of the step after `progress.step`. All ranks call this together.

    Args:
        messages: one for each such image on this rank.
        limit: `data.max_errors`, the most images that an epoch may lose over all ranks.
        progress: counts them.

    Raises UserError on all ranks when the epoch has lost more.
    """
    step = progress.step + 1
    images = [message for rank in session.dist.gather(messages) for message in rank]
    for image in images:
        session.log.line(f"warning: left out at step {step}: {image}")
    session.log.event("unread", {"epoch": progress.epoch + 1, "step": step, "count": len(images), "images": images})
    progress.unread += len(images)
    session.dist.all_or_none(lambda: _check(progress.unread, limit))


def _check(count: int, limit: int) -> None:
    if count > limit:
        raise UserError(
            f"{count} images of this epoch could not be read, more than data.max_errors ({limit}); "
            "the warnings above name them: repair or remove them, or raise data.max_errors"
        )
