"""How a run ends early in good order: on Ctrl-C, and on SIGTERM where a machine is wanted elsewhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Stoppable(Protocol):
    """What trains, and ends after the step where it is told to."""

    stop_requested: bool


class Preempted(BaseException):
    """SIGTERM outside of training: like KeyboardInterrupt, for whoever manages the machine."""


class OrderlyStop:
    """Within the block Ctrl-C and SIGTERM (a machine that is wanted elsewhere) end the run in good order.

    While a model trains (:meth:`training`) the first of them ends training before the next step; a second Ctrl-C acts
    at once, further SIGTERMs, which launchers send to be sure, do nothing more. At other times both act at once.
    Python hears signals in its main thread only: in other threads this does nothing.

    Attributes:
        heard: the first signal.

    Args:
        say: told that a signal was heard while the model trains.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.heard: int | None = None
        self.say = say
        self._model: Stoppable | None = None
        self._before: dict[int, Any] = {}

    @property
    def preempted(self) -> bool:
        """Whether it was SIGTERM that asked."""
        return self.heard == signal.SIGTERM

    def __enter__(self) -> OrderlyStop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def training(self, model: Stoppable) -> Iterator[None]:
        """Within the block signals wait for the step to end; one that came too late for that acts as it ends.

        One that was heard before acts at once: Python swallows what is raised while it runs a finaliser.
        """
        self._act()
        self._model = model
        try:
            yield
        finally:
            self._model = None
        self._act()

    def _act(self) -> None:
        if self.heard is not None:
            raise Preempted if self.preempted else KeyboardInterrupt

    def _hear(self, number: int, _: object) -> None:
        first, self.heard = self.heard is None, self.heard or number
        if number == signal.SIGTERM and not first:
            return
        if number == signal.SIGINT and not (first and self._model):
            raise KeyboardInterrupt
        if self._model is None:
            raise Preempted
        self._model.stop_requested = True
        if self.say is not None:
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            self.say(f"stopping after this step{again}")
