"""Checkpoints saved by rank 0, where a failure waits until all ranks can end together."""

from collections.abc import Callable

from acmix.checkpoint.store import Snapshot
from acmix.engine.session import Session
from acmix.errors import UserError


class Saver:
    """Saves a run's state; every method does nothing on ranks other than 0.

    An error raised at once would end rank 0 while the others wait for it. So the first one is kept in `problem`, which
    the ranks look at whenever they agree on how to go on.

    Args:
        session: the run's log and checkpoints.
        snapshot: gives the state as it is now.
    """

    def __init__(self, session: Session, snapshot: Callable[[], Snapshot]) -> None:
        self.problem: UserError | None = None
        self._session = session
        self._snapshot = snapshot
        self._reserved = False

    def reserve_once(self) -> None:
        """Get the memory for copies of the state; call it when the optimizer has its state, after the first step."""
        if not self._reserved:
            self._reserved = True
            self._attempt(lambda: self._session.store.reserve(self._snapshot()))

    def save(self, *, best: bool) -> None:
        """Save the log, then the state; `best` marks it as the best so far."""
        self._attempt(lambda: self._write(best))

    def poll(self) -> None:
        """Learn whether a save in the background has failed."""
        self._attempt(lambda: self._session.store.poll())

    def wait(self) -> None:
        """Wait until the last save is on disk."""
        self._attempt(lambda: self._session.store.wait())

    def settle(self) -> None:
        """As `wait`, at the end: a last save that failed is a problem whatever `run.on_save_error` says."""
        self._attempt(lambda: self._session.store.settle())

    def _write(self, best: bool) -> None:
        store = self._session.store
        try:
            self._session.log.sync()
        except UserError as error:  # no checkpoint without its log
            store.wait()
            store.fail(error)
            store.poll()
        else:
            store.save(self._snapshot(), best=best)

    def _attempt(self, work: Callable[[], None]) -> None:
        if not self._session.dist.is_main:
            return
        try:
            work()
        except UserError as error:
            self.problem = self.problem or error
