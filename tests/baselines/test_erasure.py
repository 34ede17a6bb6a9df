"""What takes the groups out of hidden states: projection, LEACE, affine concept editing, WRING."""

from __future__ import annotations

import math

import pytest
import torch
from baseline_task import last_states, tiny_task
from torch import Tensor

from dso.baselines import leace
from dso.baselines.activations import answered
from dso.baselines.affine_editing import edit
from dso.baselines.baseline import BaselineError
from dso.baselines.leace import eraser
from dso.baselines.projection import group_directions
from dso.baselines.wring import WringOperator, wring_embeddings


def planted(count: int = 300, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """States in three groups whose means differ, with units of different spread and away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(count) % 3
    means = 2 * torch.randn(3, width, generator=generator) + 5
    mixing = torch.randn(width, width, generator=generator)
    return means[groups] + torch.randn(count, width, generator=generator) @ mixing, groups


def erased(x: Tensor, own: dict[str, Tensor]) -> Tensor:
    return x + (x @ own["v"]) @ own["u"].T + own["b"]


def group_means(x: Tensor, groups: Tensor) -> Tensor:
    return torch.stack([x[groups == group].mean(0) for group in groups.unique()])


def test_projection_finds_a_planted_direction_beside_a_larger_one_that_is_not_the_groups() -> None:
    """Answers differ most along ``name``, in both directions in both groups; the groups' means along ``group``."""
    generator = torch.Generator().manual_seed(0)
    group, name = torch.linalg.qr(torch.randn(8, 2, generator=generator)).Q.T
    sign = torch.tensor([1.0, -1.0]).repeat(20)
    large = torch.tensor([5.0, -5.0, -5.0, 5.0]).repeat(10)
    noise = 0.02 * torch.randn(40, 8, generator=generator)
    differences = sign[:, None] * group + large[:, None] * name + noise
    found = group_directions(differences, (sign > 0).long(), 2)
    assert found.shape == (8, 2)
    assert abs(float(found[:, 0] @ group)) > 0.999 and abs(float(found[:, 1] @ name)) > 0.999
    torch.testing.assert_close(found.T @ found, torch.eye(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("count", "width"), [(300, 6), (60, 90)])
def test_leace_leaves_all_groups_the_same_mean(count, width) -> None:
    """So that no linear probe does better than a constant; also with fewer samples than units."""
    x, groups = planted(count, width)
    own = eraser(x, groups)
    after = erased(x, own)
    means = group_means(after, groups)
    assert float((means - means.mean(0)).abs().max()) < 1e-5 * float(x.abs().max())
    z = torch.nn.functional.one_hot(groups).float()
    covariance = (after - after.mean(0)).T @ (z - z.mean(0)) / len(x)
    assert float(covariance.abs().max()) < 1e-4
    torch.testing.assert_close(after.mean(0), x.mean(0), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(erased(after, own), after, atol=1e-3, rtol=1e-4)  # erasing twice changes nothing more


def test_leace_is_the_formula_with_the_shrunk_covariance() -> None:
    """Written out with whole matrices; the shrinkage is Ledoit and Wolf's, with their sums over samples spelled out."""
    x, groups = planted(40, 5)
    centred = x.double() - x.double().mean(0)
    covariance = centred.T @ centred / len(x)
    level = covariance.trace() / 5
    distance = (covariance - level * torch.eye(5, dtype=torch.float64)).square().sum()
    noise = sum((row.outer(row) - covariance).square().sum() for row in centred) / len(x) ** 2
    share = float(noise / distance)
    assert 0 < share < 1
    values, vectors = torch.linalg.eigh((1 - share) * covariance + share * level * torch.eye(5, dtype=torch.float64))
    root, whitening = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    z = torch.nn.functional.one_hot(groups).double()
    columns = whitening @ centred.T @ (z - z.mean(0))
    wanted = -root @ columns @ torch.linalg.pinv(columns) @ whitening
    own = eraser(x, groups)
    torch.testing.assert_close((own["u"] @ own["v"].T).double(), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(own["b"].double(), -wanted @ x.double().mean(0), atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_scrubbing_leaves_no_layer_a_difference_of_means() -> None:
    task = tiny_task()
    answers = answered(task, leace.DECISIONS)
    candidate = next(c for c in leace.propose(task) if c.label == "all layers, scrubbed")
    model = task.backbone.model
    for scale, most in ((0.0, math.inf), (1.0, 1e-4)):
        with candidate.steering.on(model, scale):
            states = last_states(model, answers.texts, tuple(candidate.steering.operators))
        for own in states.values():
            first, second = group_means(own, answers.groups)
            assert (first - second).abs().max() < most
            assert scale or (first - second).abs().max() > 0.05


def test_affine_editing_puts_the_groups_at_their_midpoint() -> None:
    """Means (1, 0) and (3, 0): u is the first axis, m = 2, so (5, 7) becomes (2, 7)."""
    x = torch.tensor([[1.0, -1.0], [1.0, 1.0], [3.0, -1.0], [3.0, 1.0]])
    own = edit(x, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(erased(torch.tensor([[5.0, 7.0]]), own), torch.tensor([[2.0, 7.0]]))


def test_affine_editing_weighs_units_by_their_spread() -> None:
    """Means differ by 2 in both units, whose deviations are about 1.4 and 10.0: u leans on the first."""
    x = torch.tensor([[-2.0, -11.0], [0.0, 9.0], [0.0, -9.0], [2.0, 11.0]])
    own = edit(x, torch.tensor([0, 0, 1, 1]))
    deviation = (x.var(0, unbiased=False) + 1e-4).sqrt()
    wanted = torch.nn.functional.normalize(2 / deviation, dim=0)
    torch.testing.assert_close(own["v"][:, 0].abs(), wanted)
    three, groups = planted()
    after = group_means(erased(three, edit(three, groups)), groups) @ edit(three, groups)["v"]
    torch.testing.assert_close(after, after.mean(0).expand_as(after), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("directions", "wanted"),
    [
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [5 / math.sqrt(2), 5 / math.sqrt(2), 12.0]),
        # A^T A = [[1, .6], [.6, 1]], so w is (1.6, 0.8, 0) / 1.6 scaled to length 1: (2, 1, 0) / sqrt 5
        ([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]], [2 * math.sqrt(5), math.sqrt(5), 12.0]),
    ],
)
def test_wring_by_hand(directions, wanted) -> None:
    a, v = torch.tensor(directions).T, torch.tensor([3.0, 4.0, 12.0])
    turned = wring_embeddings(v, a)
    torch.testing.assert_close(turned, torch.tensor(wanted))
    assert float(turned.norm()) == pytest.approx(13.0)
    first, second = (turned @ a).tolist()
    assert first == pytest.approx(second)


def test_wring_of_hidden_states_is_turned_by_its_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.nn.functional.normalize(torch.randn(6, 3, generator=generator), dim=0)
    h = torch.randn(2, 4, 6, generator=generator)
    operator = WringOperator(a)
    whole = operator(h, 1.0)
    torch.testing.assert_close(whole, wring_embeddings(h, a))
    torch.testing.assert_close(whole.norm(dim=-1), h.norm(dim=-1))
    near = whole @ a
    torch.testing.assert_close(near, near.mean(-1, keepdim=True).expand_as(near), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(operator(h, 0.25), h + 0.25 * (whole - h))
    half = WringOperator(a)
    for name, value in half.named_parameters():
        value.data = operator.scaled(0.25)[name].detach()
    torch.testing.assert_close(half(h, 1.0), operator(h, 0.25))


def test_directions_that_depend_on_each_other_are_refused() -> None:
    with pytest.raises(BaselineError, match="depend on each other"):
        wring_embeddings(torch.ones(3), torch.tensor([[1.0, -1.0], [2.0, -2.0], [0.0, 0.0]]))
