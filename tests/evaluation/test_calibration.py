"""The search for a scale on curves that are known, so that the answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from dso.evaluation.calibration import Calibration, Limits, Reading, calibrate
from dso.evaluation.intervals import UNMEASURED, Estimate

STEP = 2.0 / 128  # to which a scale from 0 to 2 is found


def curve(scale: float, width: float = 0.02) -> Reading:
    """Bias 0.2 - 0.1 s with an interval of 0.02 to both sides; KL 0.1 s^2; accuracy loss 0.03 s; perplexity 0.01 s."""
    bias = 0.2 - 0.1 * scale
    loss, perplexity = (Estimate(slope * scale, slope * scale - 1, slope * scale + 1) for slope in (0.03, 0.01))
    return Reading(scale, Estimate(bias, bias - width, bias + width), 0.1 * scale**2, loss, perplexity)


class Counted:
    """A curve that says where it was measured."""

    def __init__(self, measure: Callable[[float], Reading] = curve):
        self.measure, self.asked = measure, list[float]()

    def __call__(self, scale: float) -> Reading:
        self.asked.append(scale)
        return self.measure(scale)


def search(limits: Limits, measure: Callable[[float], Reading] = curve, largest: float = 2.0) -> Calibration:
    counted = Counted(measure)
    found = calibrate(counted, limits, largest)
    assert len(counted.asked) == len({*counted.asked}) == len(found.readings)  # nothing is measured twice
    assert [reading.scale for reading in found.readings] == sorted(counted.asked)
    return found


def test_the_upper_end_of_the_bias_decides() -> None:
    chosen = search(Limits(bias=0.1)).chosen  # 0.22 - 0.1 s <= 0.1 from 1.2 on, where the bias itself is 0.08
    assert chosen is not None
    assert 1.2 <= chosen.scale <= 1.2 + STEP + 1e-3
    assert chosen.bias.high <= 0.1


def test_few_scales_are_measured() -> None:
    found = search(Limits(bias=0.1))
    assert len(found.readings) == 6 + 4  # the rungs 0 to 1.25, and four halvings


def test_without_a_limit_of_bias_the_largest_scale_is_taken() -> None:
    chosen = search(Limits(kl=0.1)).chosen  # 0.1 s^2 <= 0.1 up to 1
    assert chosen is not None
    assert chosen.scale == 1.0
    both = search(Limits(kl=0.1, accuracy_loss=0.02)).chosen  # 0.03 s <= 0.02 up to 2/3
    assert both is not None
    assert 2 / 3 - STEP - 1e-3 <= both.scale <= 2 / 3
    everything = search(Limits(perplexity=0.05)).chosen
    assert everything is not None
    assert everything.scale == 2.0


def test_all_limits_hold_together_or_none_does() -> None:
    chosen = search(Limits(bias=0.1, kl=0.2, perplexity=0.02)).chosen  # KL allows 1.41
    assert chosen is not None
    assert 1.2 <= chosen.scale <= 1.2 + STEP + 1e-3
    found = search(Limits(bias=0.1, kl=0.1))  # KL allows 1, the bias asks for 1.2
    assert found.chosen is None
    assert found.nearest.scale == 1.0  # of what was measured: the bias is missed by a fifth of its limit
    assert Limits(bias=0.1, kl=0.1).broken(found.nearest) == pytest.approx({"bias": 0.12})
    assert Limits(bias=0.1, kl=0.1).distance(found.nearest) == pytest.approx(0.2)


def test_a_place_between_two_rungs_is_found() -> None:
    def narrow(scale: float) -> Reading:  # bias asks for 0.60, KL allows 0.62; rungs are at 0.5 and 0.75
        high = 0.0 if scale >= 0.6 else 1.0
        return Reading(scale, Estimate(high, high, high), float(scale > 0.62), UNMEASURED, UNMEASURED)

    chosen = search(Limits(bias=0.5, kl=0.5), narrow).chosen
    assert chosen is not None
    assert 0.6 <= chosen.scale <= 0.62


def test_costs_that_fall_again_are_no_obstacle() -> None:
    def bump(scale: float) -> Reading:
        kl = 1.0 if scale < 1.6 else 0.0
        return curve(scale)._replace(kl=kl)

    chosen = search(Limits(bias=0.1, kl=0.5), bump).chosen
    assert chosen is not None
    assert 1.6 <= chosen.scale <= 1.6 + STEP + 1e-3


def test_the_base_model_may_do() -> None:
    chosen = search(Limits(bias=0.3)).chosen
    assert chosen is not None
    assert chosen.scale == 0.0


def test_what_was_not_measured_meets_no_limit() -> None:
    found = search(Limits(bias=0.1), lambda scale: curve(scale, math.nan))
    assert found.chosen is None
    assert search(Limits(kl=0.1), lambda scale: curve(scale)._replace(kl=math.nan)).chosen is None


@pytest.mark.parametrize(("limits", "largest"), [(Limits(), 1.0), (Limits(kl=0.1), 0.0)])
def test_a_search_needs_a_limit_and_room(limits: Limits, largest: float) -> None:
    with pytest.raises(ValueError, match=r"needs a limit|above 0"):
        calibrate(curve, limits, largest)
