"""Notices a process that hangs or died while others wait for it, and says which rank and at which step."""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as torch_distributed

_BEAT_SECONDS = 1.0
_STALE_SECONDS = 10.0
_LET_GO_SECONDS = 5.0
_STORE_ERRORS = (RuntimeError, OSError, ValueError)


class Watchdog:
    """A side thread that publishes where this rank is and reads where the others are.

    The training loop calls `tick` as it goes. When a rank has not moved for `timeout` seconds the run is over: the
    lowest rank that is well names those that lag (the process stopped beating, or counted fewer ticks) and ends. It
    also ends a rank that still waits for a GPU collective some seconds after another rank reported a failure.
    """

    def __init__(self, rank: int, world_size: int, timeout: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self._ticks = 0
        self._step = 0
        self._doing = "starting"
        self._moved = time.monotonic()
        self._over = threading.Event()
        self._store: torch_distributed.TCPStore | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch; the rendezvous must be over, so that torchrun's store is there."""
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
        """Note progress: the update in work (from 1) and what is being done. Every rank ticks in the same order."""
        self._ticks += 1
        self._step, self._doing, self._moved = step, doing, time.monotonic()

    def where(self) -> str:
        """Where this rank is, for messages."""
        return f"at step {self._step} ({self._doing})"

    def claim_failure(self) -> bool:
        """Whether this rank is the first to fail, and so the one to report."""
        if self._store is None:
            return True
        try:
            return self._store.add(self._key("failures"), 1) == 1
        except _STORE_ERRORS:
            return True  # the launcher is gone with its store: better said twice than never

    def _key(self, name: str) -> str:
        return f"acmix/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"

    def _watch(self) -> None:
        failed_since: float | None = None
        while not self._over.wait(_BEAT_SECONDS):
            with suppress(*_STORE_ERRORS):
                self._publish()
                if failed_since is None and self._store is not None and self._store.add(self._key("failures"), 0) > 0:
                    failed_since = time.monotonic()
            if (
                failed_since is not None
                and time.monotonic() - failed_since > _LET_GO_SECONDS
                and not self._over.is_set()
            ):
                os._exit(1)
            if time.monotonic() - self._moved > self.timeout:
                self._report()

    def _publish(self) -> None:
        state = [self._ticks, self._step, self._doing, time.time()]
        if self._store is not None:
            self._store.set(self._key(f"beat/{self.rank}"), json.dumps(state))

    def _beats(self) -> dict[int, tuple[int, int, str, float]]:
        beats = {}
        for rank in range(self.world_size):
            with suppress(*_STORE_ERRORS):
                if self._store is not None and self._store.check([self._key(f"beat/{rank}")]):
                    beats[rank] = tuple(json.loads(self._store.get(self._key(f"beat/{rank}"))))
        return beats

    def _report(self) -> None:
        """Name the ranks that lag; only the lowest of the others speaks, the rest leave it a moment to do so."""
        beats = self._beats()
        now = time.time()
        asleep = [rank for rank, beat in beats.items() if now - beat[3] > _STALE_SECONDS]
        awake = {rank: beat[0] for rank, beat in beats.items() if rank not in asleep}
        behind = [rank for rank, ticks in awake.items() if ticks < max(awake.values())]
        culprits = asleep or behind or list(beats)
        well = [rank for rank in awake if rank not in culprits] or sorted(awake) or [self.rank]
        if self.rank == well[0]:
            places = "; ".join(
                f"rank {rank} at step {beats[rank][1]} ({'no sign of life' if rank in asleep else beats[rank][2]})"
                for rank in culprits
                if rank in beats
            )
            print(
                f"error: no progress for {self.timeout:g} s (run.timeout). Waiting for: {places or self.where()}. "
                "Look at that process and its machine; continue with --resume auto.",
                file=sys.stderr,
                flush=True,
            )
        else:
            time.sleep(_LET_GO_SECONDS)
        os._exit(1)
