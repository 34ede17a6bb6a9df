"""Operators against their formulas, evaluated in float64 element by element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dso.errors import UserError
from dso.steering.operators import AffineOperator, BiasOperator, LowRankOperator, make_operator

WIDTH = 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(kind: str) -> nn.Module:
    operator = make_operator(kind, WIDTH, 2 if kind == "low_rank" else None)
    for number, parameter in enumerate(operator.parameters()):
        parameter.data = drawn(*parameter.shape, seed=number + 1)
    return operator


def formula(operator: nn.Module, h: Tensor, scale: Tensor | float) -> Tensor:
    """The docstring's formulas, number by number in float64; ``h`` is (batch, length, width)."""
    named = {name: value.detach().double() for name, value in operator.named_parameters()}
    wanted = torch.empty(h.shape, dtype=torch.float64)
    for row in range(h.shape[0]):
        s = float(scale) if not isinstance(scale, Tensor) or scale.ndim == 0 else float(scale[row])
        for place in range(h.shape[1]):
            for i in range(WIDTH):
                x = h[row, place].double()
                added = named["b"][i]
                if "a" in named:
                    added = added + named["a"][i] * x[i]
                if "u" in named:
                    for rank in range(named["u"].shape[1]):
                        added = added + named["u"][i, rank] * sum(named["v"][j, rank] * x[j] for j in range(WIDTH))
                wanted[row, place, i] = x[i] + s * added
    return wanted


@pytest.mark.parametrize("scale", [1.0, 0.4, -0.7, 0.0])
@pytest.mark.parametrize("kind", ["affine", "bias", "low_rank"])
def test_formulas(kind, scale):
    h = drawn(2, 3, WIDTH, seed=9)
    operator = filled(kind)
    wanted = formula(operator, h, scale)
    for given in (scale, torch.tensor(scale)):
        found = operator(h, given)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-6)


@torch.no_grad()
def test_operators_by_hand():
    h = torch.tensor([2.0, -3.0])
    values = {"a": [0.5, 1.0], "b": [1.0, -1.0], "u": [[2.0], [1.0]], "v": [[1.0], [1.0]]}
    wanted = {
        "affine": [3.0, -5.0],  # 2 + 0.5 (0.5 * 2 + 1) and -3 + 0.5 (1 * -3 - 1)
        "scale": [2.5, -4.5],  # 2 + 0.5 * 0.5 * 2 and -3 + 0.5 * 1 * -3
        "bias": [2.5, -3.5],
        "low_rank": [1.5, -4.0],  # V^T h = -1, U V^T h = (-2, -1): 2 + 0.5 (-2 + 1) and -3 + 0.5 (-1 - 1)
    }
    for kind, result in wanted.items():
        operator = make_operator(kind, 2, 1 if kind == "low_rank" else None)
        for name, value in operator.named_parameters():
            value.copy_(torch.tensor(values[name]))
        assert operator(h, 0.5).tolist() == result


@pytest.mark.parametrize("kind", ["affine", "bias", "low_rank"])
def test_one_scale_a_row(kind):
    h = drawn(3, 4, WIDTH)
    scales = torch.tensor([0.0, 0.5, 1.0])
    operator = filled(kind)
    found = operator(h, scales.view(3, 1, 1))
    torch.testing.assert_close(found.double(), formula(operator, h, scales), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("kind", ["affine", "bias", "low_rank"])
def test_half_precision_is_computed_in_float32(kind):
    h = drawn(2, 3, WIDTH).to(torch.bfloat16)
    operator = filled(kind)
    found = operator(h, 0.3)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, formula(operator, h, 0.3).float().to(torch.bfloat16))


def test_small_changes_are_not_lost_before_the_last_rounding():
    # 1 + 0.003 is 1 in bfloat16, but 100 (1 + 0.003) + 0.2 = 100.5 is not 100.
    operator = AffineOperator(1)
    operator.a.data.fill_(0.003)
    operator.b.data.fill_(0.2)
    assert operator(torch.tensor([100.0], dtype=torch.bfloat16), 1.0).item() == 100.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["affine", "bias", "low_rank"])
def test_the_start_is_the_identity_and_scale_0_is_always(kind, dtype):
    h = (drawn(2, 3, WIDTH) * 100).to(dtype)
    fresh = make_operator(kind, WIDTH, 2 if kind == "low_rank" else None)
    assert torch.equal(fresh(h, 1.0), h)
    assert torch.equal(filled(kind)(h, 0.0), h)


@pytest.mark.parametrize("kind", ["affine", "bias", "low_rank"])
def test_scaled_coefficients_do_at_1_what_the_operator_does_at_that_scale(kind):
    operator, smaller = filled(kind), make_operator(kind, WIDTH, 2 if kind == "low_rank" else None)
    smaller.load_state_dict(operator.scaled(0.3))
    h = drawn(2, 3, WIDTH, seed=9)
    torch.testing.assert_close(smaller(h, 1.0), operator(h, 0.3))
    assert all(torch.equal(value, operator.scaled(1.0)[name]) for name, value in operator.named_parameters())


def test_gradients_of_affine_by_hand():
    operator = filled("affine")
    h, up = drawn(2, 3, WIDTH).requires_grad_(True), drawn(2, 3, WIDTH, seed=5)
    operator(h, 0.4).backward(up)
    # dL/da = sum 0.4 h g, dL/db = sum 0.4 g, dL/dh = (1 + 0.4 a) g
    torch.testing.assert_close(operator.a.grad, (0.4 * h * up).sum((0, 1)).detach())
    torch.testing.assert_close(operator.b.grad, (0.4 * up).sum((0, 1)))
    torch.testing.assert_close(h.grad, ((1 + 0.4 * operator.a) * up).detach())


def test_low_rank_learns_from_its_start():
    operator = make_operator("low_rank", WIDTH, 2)
    assert operator.u.abs().sum() == 0 and operator.v.abs().min() > 0
    h, up = drawn(2, 3, WIDTH), drawn(2, 3, WIDTH, seed=5)
    operator(h, 1.0).backward(up)
    torch.testing.assert_close(operator.u.grad, torch.einsum("bti,btj,jr->ir", up, h, operator.v).detach())
    assert operator.v.grad.abs().sum() == 0  # all zero as long as U is
    torch.testing.assert_close(operator.b.grad, up.sum((0, 1)))


def test_affine_is_one_fused_operation_over_the_activation(monkeypatch):
    calls = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.numel() == 4 * 5 * WIDTH:
                calls.append(str(function))
            return result

    h, operator = drawn(4, 5, WIDTH), filled("affine")
    with Counting():
        operator(h, torch.tensor(0.5))
    assert calls == ["aten.addcmul.default"]


def test_kinds_and_shapes():
    assert isinstance(make_operator("affine", 5), AffineOperator)
    assert isinstance(make_operator("bias", 5), BiasOperator)
    operator = make_operator("low_rank", 5, 5)
    assert isinstance(operator, LowRankOperator)
    shapes = {name: tuple(value.shape) for name, value in operator.named_parameters()}
    assert shapes == {"u": (5, 5), "v": (5, 5), "b": (5,)}
    assert {name for name, _ in make_operator("affine", 5).named_parameters()} == {"a", "b"}
    assert {name for name, _ in make_operator("bias", 5).named_parameters()} == {"b"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear", 4), "operator kind is 'linear', expected one of affine, scale, bias, low_rank"),
        (("low_rank", 4), "'low_rank' with rank None: low_rank needs a rank"),
        (("affine", 4, 2), "'affine' with rank 2: low_rank needs a rank, the others take none"),
        (("low_rank", 4, 0), r"rank is 0, expected 1 to 4 \(the site's width\)"),
        (("low_rank", 4, 5), "rank is 5, expected 1 to 4"),
        (("low_rank", 4, 1.5), "rank is 1.5, expected 1 to 4"),
    ],
)
def test_what_is_no_operator_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        make_operator(*arguments)
