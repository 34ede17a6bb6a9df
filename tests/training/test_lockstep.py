"""Passes in step with other processes, one process at a time: what it tells them, and what it does when told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_llama
from torch import nn

from dso.errors import UserError
from trainers.parallel.lockstep import InStep, Kept
from trainers.parallel.ranks import World

IDS = torch.tensor([[5, 6, 7]])


class Others(World):
    """Other processes, by a script of their passes: 1 without gradient, 2 with, 3 and 4 the same with images."""

    device = torch.device("cpu")

    def __init__(self, *numbers: int):
        self.numbers = list(numbers)
        self.told: list[int] = []

    def most(self, number: int) -> int:
        self.told.append(number)
        return max(number, self.numbers.pop(0))


class Model(nn.Module):
    """Notes its inputs; logits are its one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.seen: list[tuple[list[int], bool, bool]] = []

    def forward(self, input_ids: torch.Tensor, pixels: torch.Tensor | None = None, **_: object) -> SimpleNamespace:
        self.seen.append((list(input_ids.shape), pixels is not None, torch.is_grad_enabled()))
        return SimpleNamespace(logits=self.weight * torch.ones(*input_ids.shape, 4))


def test_a_process_passes_as_often_as_the_others() -> None:
    model, world = Model(), Others(2, 1, 2, 0)
    in_step = InStep(model, world)
    model(input_ids=IDS)
    nothing = in_step.finish()
    assert world.told == [2, 0, 0, 0]
    # Its own pass of three tokens, then one of a token for each of theirs, with gradient where theirs has one.
    assert model.seen == [([1, 3], False, True), ([1, 1], False, False), ([1, 1], False, True)]
    assert nothing.item() == 0.0
    nothing.backward()
    assert model.weight.grad == 0.0


def test_idle_passes_without_gradient_leave_nothing_to_go_back_through() -> None:
    model = Model()
    in_step = InStep(model, Others(1, 0, 2, 0))
    assert not in_step.finish().requires_grad
    with torch.no_grad():  # nothing of this process is learned from here, so the others' gradients are no matter
        assert not in_step.finish().requires_grad
    assert [graded for *_, graded in model.seen] == [False, False]


def test_sums_wait_until_nobody_passes_any_more() -> None:
    model, world = Model(), Others(1, 1, 0)
    assert InStep(model, world).all_sum(torch.tensor([3.0])).tolist() == [3.0]
    assert len(model.seen) == 2 and not world.numbers


def test_idle_passes_have_images_where_the_others_have() -> None:
    model, world = Model(), Others(4, 0, 3, 1, 0)
    in_step = InStep(model, world)
    model(input_ids=IDS, pixels=torch.ones(1))
    assert world.told == [4]
    in_step.finish()
    in_step.finish()
    assert model.seen[1:] == [([1, 3], True, False), ([1, 1], False, False)]


@pytest.mark.parametrize("own", [True, False], ids=["text", "idle"])
def test_passes_with_and_without_images_are_refused(own: bool) -> None:
    model = Model()
    in_step = InStep(model, Others(4))
    with pytest.raises(UserError, match="with and without images meet in one step, but ZeRO-3 .* use stage 0, 1 or 2"):
        if own:
            model(input_ids=IDS)
        else:
            in_step.finish()
    assert not model.seen  # it does not even begin


def test_a_model_passes_as_it_does_alone() -> None:
    model = tiny_llama()
    wanted = model(input_ids=IDS).logits
    in_step = InStep(model, Others(0, 1, 0))
    assert torch.equal(model(input_ids=IDS).logits, wanted)
    assert in_step.finish().item() == 0.0


class Weight:
    """What DeepSpeed makes of a parameter: whole or not, and which modules use it."""

    def __init__(self, status: str):
        self.ds_status = SimpleNamespace(name=status)
        self.ds_active_sub_modules: set[int] = set()
        self.gathered: list[list[Weight]] = []

    def all_gather(self, weights: list[Weight]) -> None:
        self.gathered.append(weights)

    def partition(self) -> None:
        if self.ds_active_sub_modules:
            raise RuntimeError("in use")
        self.ds_status.name = "NOT_AVAILABLE"


def test_small_weights_stay_whole_and_others_begin_divided() -> None:
    small, gone = Weight("AVAILABLE"), Weight("NOT_AVAILABLE")
    left, divided = Weight("AVAILABLE"), Weight("NOT_AVAILABLE")
    left.ds_active_sub_modules.add(4)  # of a module whose backward pass never came
    coordinator, released = SimpleNamespace(reset_step=None), []
    offload = SimpleNamespace(
        persistent_parameters=[small, gone],
        module=SimpleNamespace(parameters=lambda: [small, gone, left, divided]),
        get_param_coordinator=lambda: coordinator,
        release_backward_leftovers=lambda: released.append(True),
    )
    kept = Kept(offload)
    kept.hold()
    assert gone.gathered == [[gone]] and not small.gathered  # in one exchange, of those that are not whole
    coordinator.reset_step()  # as DeepSpeed calls it when a pass begins
    assert released == [True]
    assert [w.ds_status.name for w in (small, left, divided)] == ["AVAILABLE", "NOT_AVAILABLE", "NOT_AVAILABLE"]
    # DeepSpeed lets go of a weight only where no module uses it, and takes itself off after each pass.
    assert all(w.ds_active_sub_modules == {Kept.HELD} for w in (small, gone))
    assert left.ds_active_sub_modules == set()
