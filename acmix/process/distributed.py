"""The ranks of a run: how they meet, exchange small messages, agree, and fail together."""

import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.distributed as torch_distributed
from torch import Tensor, nn

from acmix.config import RunConfig
from acmix.errors import UserError
from acmix.process.program import BAD_USAGE, FAILED, ReportedElsewhere, RunFailure
from acmix.process.signals import ending_with_launcher
from acmix.process.watchdog import Watchdog

Result = TypeVar("Result")

_DESCRIPTION = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun puts in the environment of a process besides its RANK."""


class Verdict(NamedTuple):
    """What all ranks agree on at a step boundary.

    loss: mean over ranks; bad_ranks: how many hold a loss that is not finite; unread: images left out as unreadable;
    stop: whether any rank was asked to stop; give_up: whether any cannot go on.
    """

    loss: float
    bad_ranks: int
    unread: int
    stop: bool
    give_up: bool


@dataclass
class Distributed:
    """One process among `world_size`; a context manager that leaves the group, and has a failure reported only once.

    Small messages (stop requests, sums of an evaluation, errors) travel over gloo on the CPU even if gradients travel
    over nccl, so they never wait for a GPU kernel and take no GPU memory.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    watchdog: Watchdog
    control: Any = None  # a gloo ProcessGroup; None for a single process

    @classmethod
    def start(cls, run: RunConfig) -> Self:
        """Join the group that torchrun describes in the environment; without torchrun, be the only process.

        Raises UserError when `run.device` is cuda and there is no CUDA, or fewer GPUs than processes on this machine,
        and when the environment describes a group in part.
        """
        if "RANK" not in os.environ:  # a WORLD_SIZE alone, as some batch systems export it, makes no group
            return cls(0, 1, 0, _pick_device(run.device, 0), Watchdog(0, 1, run.timeout))
        if missing := [name for name in _DESCRIPTION if name not in os.environ]:
            raise UserError(
                f"the environment has RANK, but not {', '.join(missing)}: start several processes with torchrun, or "
                "take RANK out of the environment to start one"
            )
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = _pick_device(run.device, local_rank)
        watchdog = Watchdog(rank, world_size, run.timeout)
        # The watchdog reports a hang with rank and step; the group's own timeout is the fallback.
        timeout = timedelta(seconds=run.timeout + 60)
        with ending_with_launcher():
            store, token = _meet(rank, world_size, timeout)
            control = _join(device, store=store, rank=rank, world_size=world_size, timeout=timeout)
            watchdog.start(token)
        return cls(rank, world_size, local_rank, device, watchdog, control)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs and saves."""
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum a CPU tensor over all ranks, in place."""
        if self.control is not None:
            torch_distributed.all_reduce(values, group=self.control)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Values are JSON: nothing is unpickled."""
        if self.control is None:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = len(text)
        self.all_reduce(sizes)
        texts = torch.zeros(self.world_size, int(sizes.max()), dtype=torch.uint8)
        texts[self.rank, : len(text)] = text
        self.all_reduce(texts)
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(texts, sizes.tolist(), strict=True)]

    def from_main(self, value: Any) -> Any:
        """Rank 0's value (JSON), on every rank."""
        return self.gather(value if self.is_main else None)[0]

    def agree(
        self, *, loss: float = 0.0, bad: bool = False, unread: int = 0, stop: bool = False, give_up: bool = False
    ) -> Verdict:
        """One small collective after which all ranks know, and act on, what any of them reported."""
        if self.control is None:
            return Verdict(loss, int(bad), unread, stop, give_up)
        sums = torch.tensor([loss, bad, unread, stop, give_up], dtype=torch.float64)
        loss, bad_ranks, unread_images, stops, gives_up = self.all_reduce(sums).tolist()
        return Verdict(loss / self.world_size, int(bad_ranks), int(unread_images), stops > 0, gives_up > 0)

    def all_or_none(self, work: Callable[[], Result]) -> Result:
        """Run `work` on every rank; if any raises UserError, all stop and the lowest failing rank reports it."""
        result: Result | None = None
        problem: UserError | None = None
        try:
            result = work()
        except UserError as error:
            problem = error
        failures = self.gather(None if problem is None else getattr(problem, "status", 2))
        failed = [rank for rank, status in enumerate(failures) if status is not None]
        if failed and (problem is None or self.rank != failed[0]):
            raise ReportedElsewhere(failures[failed[0]])
        if problem is not None:
            raise problem
        return result  # type: ignore[return-value]  # None only where Result allows it

    def on_main(self, work: Callable[[], Result]) -> Result | None:
        """Run `work` on rank 0 only; the others get None when it is done, or stop without a message if it fails."""
        return self.all_or_none(lambda: work() if self.is_main else None)

    def share_buffers(self, module: nn.Module) -> None:
        """Give every rank rank 0's buffers (batch norm statistics), so that all evaluate and save the same network."""
        if self.control is not None:
            for buffer in module.buffers():
                torch_distributed.broadcast(buffer, 0)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.all_reduce(torch.zeros(1))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.watchdog.stop()
            if self.control is not None:
                torch_distributed.destroy_process_group()
            return
        if self.control is None or isinstance(error, (ReportedElsewhere, SystemExit)):
            return
        status = getattr(error, "status", BAD_USAGE) if isinstance(error, UserError) else FAILED
        first = self.watchdog.claim_failure(status, str(error) or type(error).__name__)
        if first is not None:
            raise ReportedElsewhere(first.status) from None
        if isinstance(error, UserError):
            error.reported_here = True  # type: ignore[attr-defined]
        if _is_lost_connection(error):
            where = self.watchdog.where()
            failure = RunFailure(
                f"rank {self.rank} lost another process {where}: it was killed or its machine is gone; what it printed "
                f"last says more. Continue with --resume auto. ({str(error).splitlines()[0]})"
            )
            failure.reported_here = True
            raise failure from None


def _meet(rank: int, world_size: int, timeout: timedelta) -> tuple[torch_distributed.Store, str]:
    """A store for the processes of this attempt alone, and the token that names it.

    torchrun's store outlives its workers: a restarted worker would find the addresses of dead processes. The number of
    restarts cannot tell attempts apart, as machines count them differently. So each rank registers under a fresh name,
    and rank 0 answers every name it sees with this attempt's token until all ranks have received it.
    """
    store, _, _ = next(torch_distributed.rendezvous("env://", rank, world_size, timeout=timeout))
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"acmix/hello/{rank}", name)
        token = store.get(f"acmix/welcome/{name}").decode()
        store.set(f"acmix/{token}/here/{rank}", "")
        return torch_distributed.PrefixStore(f"acmix/{token}", store), token
    waiting = set(range(1, world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"acmix/hello/{other}"]):
                store.set(f"acmix/welcome/{store.get(f'acmix/hello/{other}').decode()}", name)
        waiting = {other for other in waiting if not store.check([f"acmix/{name}/here/{other}"])}
        if time.monotonic() > deadline:
            raise RunFailure(
                f"ranks {sorted(waiting)} did not start within {timeout.total_seconds():g} s (run.timeout)"
            )
        time.sleep(0.02)
    return torch_distributed.PrefixStore(f"acmix/{name}", store), name


def _join(device: torch.device, **group: Any) -> Any:
    """Form the group that exchanges gradients; returns the one for small messages."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch_distributed.init_process_group("nccl", device_id=device, **group)
        return torch_distributed.new_group(backend="gloo", timeout=group["timeout"])
    torch_distributed.init_process_group("gloo", **group)
    return torch_distributed.group.WORLD


def _pick_device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device is cuda, but torch finds no CUDA device here; use run.device=auto or cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"torchrun started more processes than this machine has GPUs ({count}); lower --nproc-per-node")
    return torch.device("cuda", local_rank)


def _is_lost_connection(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, torch_distributed.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "Connection" in text or "NCCL" in text)
    )
