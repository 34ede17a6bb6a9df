"""Ctrl-C and SIGTERM end training at a whole step, and everything else at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator

import pytest
from small_runs import learn, make_trainer
from stable_baselines3.common.callbacks import CallbackList

from trainers.callbacks import Progress
from trainers.parallel.ranks import World
from trainers.stopping import OrderlyStop, Preempted


def hear(number: int) -> None:
    """Send this process a signal; Python handles it before the next line."""
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests were started in the background, which ignores it."""
    before = {number: signal.getsignal(number) for number in OrderlyStop.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_ctrl_c_stops_after_the_step_and_the_second_one_at_once() -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with OrderlyStop(said.append) as stop, pytest.raises(KeyboardInterrupt), stop.training(trainer):
        hear(signal.SIGINT)
        assert trainer.stop_requested
        assert said == ["stopping after this step; Ctrl-C again stops at once"]
        hear(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert not stop.preempted


def test_sigterm_stops_after_the_step_however_often_it_comes() -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)
    said: list[str] = []
    with OrderlyStop(said.append) as stop:
        with pytest.raises(Preempted), stop.training(trainer):  # nobody heeded it: it is not lost at the end
            for _ in range(3):
                hear(signal.SIGTERM)
            assert trainer.stop_requested
            assert said == ["stopping after this step"]
        assert stop.preempted


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Preempted)])
def test_outside_of_training_both_act_at_once(number: int, error: type[BaseException]) -> None:
    trainer = make_trainer(ambiguous=4)
    with OrderlyStop() as stop, pytest.raises(error):
        with stop.training(trainer):
            pass
        hear(number)
    assert not trainer.stop_requested
    assert stop.preempted == (number == signal.SIGTERM)
    assert not issubclass(Preempted, Exception)  # so that nothing on the way takes it for a failure


def test_a_second_sigterm_does_not_disturb_what_the_first_one_began() -> None:
    with OrderlyStop() as stop:
        with pytest.raises(Preempted):
            hear(signal.SIGTERM)
        hear(signal.SIGTERM)  # as the run tidies up
    assert stop.preempted


def test_a_signal_that_a_finaliser_swallowed_stops_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finalised:
        def __del__(self) -> None:
            hear(signal.SIGTERM)

    trainer, trained, swallowed = make_trainer(ambiguous=4), False, []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: swallowed.append(raised.exc_type))
    with OrderlyStop() as stop:
        Finalised()
        assert swallowed == [Preempted]
        with pytest.raises(Preempted), stop.training(trainer):
            trained = True
    assert not trained


@pytest.mark.parametrize("number", OrderlyStop.SIGNALS)
def test_a_run_that_is_asked_to_stop_ends_at_a_whole_step(number: int) -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)

    class Interrupt(Progress):
        def _on_step(self) -> bool:
            if self.n_calls == 2:
                hear(number)
            return True

    heard = KeyboardInterrupt if number == signal.SIGINT else Preempted
    with OrderlyStop() as stop, pytest.raises(heard), stop.training(trainer):  # told at the end, as nobody else is
        learn(trainer, 9, CallbackList([Interrupt(9, quiet=True)]))
    assert (trainer.steps_done, trainer._n_updates) == (2, 2)


def test_other_threads_are_left_without_it() -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with OrderlyStop():
                pass
        except ValueError as error:
            failed.append(error)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_during_the_wait_for_the_others_ends_training_one_step_later() -> None:
    trainer = make_trainer()

    class Heard(World):
        def agree(self, flag: bool) -> bool:
            trainer.stop_requested = True  # as a signal would, after this process has said that it heard none
            return flag

    trainer.world = Heard()
    trainer.learn(8 * trainer.env.num_envs)
    assert trainer.steps_done == 1
    assert trainer.stop_requested
