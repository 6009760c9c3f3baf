"""Notices a process that hangs or has died while others wait for it; says which rank, and at which step."""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as torch_distributed

from acmix.process.program import FAILED, end_now

_BEAT_SECONDS = 1.0
_STALE_SECONDS = 3.0
_LET_GO_SECONDS = 5.0
_STORE_ERRORS = (RuntimeError, OSError, ValueError)


class Failure(NamedTuple):
    """The rank that failed first, the exit status that is due to its error, and what the error says."""

    rank: int
    status: int
    message: str


class Watchdog:
    """A background thread that publishes this rank's progress and reads that of the others.

    The training loop calls `tick` as it goes. When a rank makes no progress for `timeout` seconds the run is over: the
    lowest healthy rank names those that lag (no heartbeat, or fewer ticks), and the processes end. The thread also ends
    a rank that still waits for a GPU collective some seconds after another rank reported a failure.
    """

    def __init__(self, rank: int, world_size: int, timeout: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self._beat = 0
        self._ticks = 0
        self._step = 0
        self._doing = "starting"
        self._moved = time.monotonic()
        self._over = threading.Event()
        self._token = ""
        self._store: torch_distributed.TCPStore | None = None
        self._thread: threading.Thread | None = None

    def start(self, token: str) -> None:
        """Start the thread; `token` names this attempt in the store through which the ranks have met."""
        self._token = token
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=_LET_GO_SECONDS)
        self._store = torch_distributed.TCPStore(
            address, port, is_master=False, timeout=patience, wait_for_workers=False
        )
        self._thread = threading.Thread(target=self._watch, name="acmix-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=_LET_GO_SECONDS)

    def tick(self, step: int, doing: str) -> None:
        """Note progress: the current update (from 1) and what is being done. Every rank ticks in the same order."""
        self._ticks += 1
        self._step, self._doing, self._moved = step, doing, time.monotonic()

    def where(self) -> str:
        """Where this rank is, for messages."""
        return f"at step {self._step} ({self._doing})"

    def claim_failure(self, status: int, message: str) -> Failure | None:
        """Tell the others that this rank fails. None if it is the first, and so the one to report; else which was."""
        mine = Failure(self.rank, status, message)
        try:
            if self._store is not None:
                found = self._store.compare_set(self._key("failure"), "", json.dumps(mine))
                first = Failure(*json.loads(found))
                return None if first.rank == self.rank else first
        except _STORE_ERRORS:
            pass  # the launcher is gone with its store: better reported twice than never
        return None

    def failure(self) -> Failure | None:
        """What a rank has told of its failure; None while all are well."""
        with suppress(*_STORE_ERRORS):
            if self._store is not None and self._store.check([self._key("failure")]):
                return Failure(*json.loads(self._store.get(self._key("failure"))))
        return None

    def _key(self, name: str) -> str:
        return f"acmix/{self._token}/{name}"

    def _watch(self) -> None:
        failure: Failure | None = None
        told = 0.0
        while not self._over.is_set():
            with suppress(*_STORE_ERRORS):
                self._publish()
            if failure is None and (failure := self.failure()) is not None:
                told = time.monotonic()
            if failure is not None and time.monotonic() - told > _LET_GO_SECONDS and not self._over.is_set():
                end_now(failure.status)
            if time.monotonic() - self._moved > self.timeout:
                self._report()
            self._over.wait(_BEAT_SECONDS)

    def _publish(self) -> None:
        self._beat += 1
        state = [self._ticks, self._doing, self._beat]
        if self._store is not None:
            self._store.set(self._key(f"beat/{self.rank}"), json.dumps(state))

    def _beats(self) -> dict[int, tuple[int, str, int]]:
        beats = {}
        for rank in range(self.world_size):
            with suppress(*_STORE_ERRORS):
                if self._store is not None and self._store.check([self._key(f"beat/{rank}")]):
                    beats[rank] = tuple(json.loads(self._store.get(self._key(f"beat/{rank}"))))
        return beats

    def _report(self) -> None:
        """Name the ranks that lag; the lowest healthy rank prints it, the others wait a moment before they end."""
        before = self._beats()
        time.sleep(_STALE_SECONDS)
        self._publish()
        beats = self._beats()
        asleep = [rank for rank in range(self.world_size) if beats.get(rank) == before.get(rank)]
        awake = {rank: beat[0] for rank, beat in beats.items() if rank not in asleep}
        behind = [rank for rank, ticks in awake.items() if ticks < max(awake.values())]
        culprits = asleep or behind or list(beats)
        well = [rank for rank in awake if rank not in culprits] or sorted(awake) or [self.rank]
        if self.rank == well[0]:
            # Ranks wait for each other in every step, so all of them are at this rank's step.
            lagging = "; ".join(
                f"rank {rank} ({'no sign of life' if rank in asleep else beats[rank][1]})" for rank in culprits
            )
            print(
                f"error: no progress for {self.timeout:g} s (run.timeout) at step {self._step}, waiting for "
                f"{lagging or 'an unknown rank'}: look at that process and its machine; continue with --resume auto",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_LET_GO_SECONDS)  # the others read the store too, and this process may host it
        end_now(FAILED)
