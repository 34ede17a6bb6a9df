"""The processes of a run, and what they have to tell each other.

Every process draws the same batch, decides its own share of it and learns of the others' answers, so that rewards,
running preferences, the price of KL and every verdict (skip a step, stop, keep a checkpoint) are the same everywhere.
:class:`World` is one process by itself: it exchanges nothing and imports no launcher's library. :class:`Ranks` are the
processes that a launcher started.

What they tell each other are a few numbers a step. They go over gloo on the CPU, on machines with GPUs too: gloo raises
an error where another process is gone or late, and NCCL, which DeepSpeed's exchanges go over there, ends the process
that waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from dso.errors import UserError

T = TypeVar("T")


class RankLost(UserError):
    """Another process of the job ended or does not answer."""

    secondhand = True  # that process knows better why


class World:
    """One process by itself; the base class of several.

    Attributes:
        rank: which process this is, 0 to ``size`` - 1.
        size: how many there are.
        device: what the model runs on; None leaves it to the config.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def all_sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all processes, the same bits in each; ``values`` is left as it was."""
        return values

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return number

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.most(int(flag)))

    def broadcast_object(self, value: T) -> T:
        """What the main process holds: plain values only (they are pickled on the way)."""
        return value

    def barrier(self) -> None:
        """Wait until every process is here."""

    def guard(self, work: Callable[[], T]) -> T:
        """Run work in which processes wait for each other.

        Raises:
            RankLost: if one of them is gone or does not come.
        """
        return work()

    def meet(self, work: Callable[[], T]) -> T:
        """Run work in which DeepSpeed exchanges something, once every process has come to it.

        Raises:
            RankLost: if one does not come, or is gone. Where one goes amid the work, NCCL ends this process.
        """
        self.barrier()
        return self.guard(work)

    @contextmanager
    def groups_in_time(self) -> Iterator[None]:
        """Groups of processes that a library makes within the block give up as we do; else it takes 30 minutes."""
        yield

    def require(self, error: UserError | None) -> None:
        """Raise the error of the first process that has one, in every process.

        Raises:
            UserError: that error; of the same type in the process that had it.
        """
        if error is not None:
            raise error

    def close(self) -> None:
        """Leave the group; nothing can be exchanged after it."""


class Ranks(World):
    """The processes that a launcher started, over torch.distributed.

    Args:
        device: what the model runs on; DeepSpeed's backend follows from it (nccl on cuda, gloo on cpu).
        timeout: seconds that a process waits for the others before it gives up.
    """

    def __init__(self, device: torch.device, timeout: float = 600.0):
        import torch.distributed as dist

        self._dist = dist
        self.device = device
        self.timeout = timeout
        on_gpu = device.type == "cuda"
        limit = timedelta(seconds=timeout)
        if not dist.is_initialized():
            self.guard(lambda: dist.init_process_group("nccl" if on_gpu else "gloo", timeout=limit))
        self._group = self.guard(lambda: dist.new_group(backend="gloo", timeout=limit)) if on_gpu else None
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def all_sum(self, values: Tensor) -> Tensor:
        total = values.detach().to("cpu", copy=True).contiguous()
        self.guard(lambda: self._dist.all_reduce(total, group=self._group))
        return total.to(values.device)

    def most(self, number: int) -> int:
        value = torch.tensor(number)
        self.guard(lambda: self._dist.all_reduce(value, self._dist.ReduceOp.MAX, group=self._group))
        return int(value)

    def broadcast_object(self, value: T) -> T:
        box: list[Any] = [value]
        self.guard(lambda: self._dist.broadcast_object_list(box, src=0, group=self._group))
        return box[0]

    def barrier(self) -> None:
        self.most(0)

    def require(self, error: UserError | None) -> None:
        found: list[str | None] = [None] * self.size
        told = None if error is None else str(error)
        self.guard(lambda: self._dist.all_gather_object(found, told, group=self._group))
        if error is not None:
            raise error
        for rank, message in enumerate(found):
            if message is not None:
                raise UserError(message if rank == 0 else f"process {rank}: {message}")

    def close(self) -> None:
        if self._dist.is_initialized():
            self._dist.destroy_process_group()

    @contextmanager
    def groups_in_time(self) -> Iterator[None]:
        make = self._dist.new_group
        self._dist.new_group = partial(make, timeout=timedelta(seconds=self.timeout))
        try:
            yield
        finally:
            self._dist.new_group = make

    def guard(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except RuntimeError as error:
            if not _is_lost(error):
                raise
            reason = (str(error).splitlines() or ["no reason given"])[0].split(". ")[0]
            raise RankLost(
                f"process {self.rank}: another process of the job ended, or did not answer within {self.timeout:g} s; "
                f"its own message says why ({reason})"
            ) from error


def _is_lost(error: RuntimeError) -> bool:
    """Whether an error is of the connection to other processes; gloo has no exception of its own."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or any(word in str(error) for word in ("gloo", "Connection", "Timed out"))
