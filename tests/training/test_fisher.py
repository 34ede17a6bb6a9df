"""The Fisher preconditioner against closed forms."""

from __future__ import annotations

import pytest
import torch

from trainers.fisher import fisher_diagonal, whitened_step, whitening


def test_the_fisher_information_of_a_softmax_is_its_closed_form() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.5, -1.0, 1.5], requires_grad=True)
    share = logits.detach().softmax(0)
    # d log p(y) / d z_i = [y = i] - p_i, so F_ii = p_i (1 - p_i); twelve prompts are alike here.
    batches = 4000

    def log_probs():
        for _ in range(batches):
            yield logits.log_softmax(0).expand(12, 3)

    [found] = fisher_diagonal(log_probs, [logits])
    # One draw is about F times a chi-square of one degree of freedom: standard deviation sqrt(2) F.
    torch.testing.assert_close(found, share * (1 - share), rtol=4 * (2 / batches) ** 0.5, atol=0)


def test_a_parameter_that_plays_no_part_has_none() -> None:
    logits, idle = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    found = fisher_diagonal(lambda: [logits.log_softmax(0)[None]], [logits, idle])
    assert torch.equal(found[1], torch.zeros(3))
    with pytest.raises(ValueError, match="no batches"):
        fisher_diagonal(list, [logits])


def test_whitening_by_hand() -> None:
    # mean F = 2; without damping F D^2 is 2 everywhere before scaling, and the scale is sqrt(8 / 8) = 1.
    [sizes] = whitening([torch.tensor([1.0, 4.0, 1.0, 2.0])], damping=0.0)
    torch.testing.assert_close(sizes, torch.tensor([2**0.5, 0.5**0.5, 2**0.5, 1.0]))
    fisher = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([0.5])]
    sizes = whitening(fisher, damping=0.1)
    cost = sum(float((f * d.square()).sum()) for f, d in zip(fisher, sizes, strict=True))
    assert cost == pytest.approx(3.5)  # a unit step in every z costs what a unit step in every x cost
    assert sizes[1][0] == sizes[1][1]
    assert [d.tolist() for d in whitening([torch.zeros(2)], 0.1)] == [[1.0, 1.0]]


def test_a_whitened_step_of_gradient_descent_moves_by_the_square_of_the_size() -> None:
    parameter = torch.tensor([1.0, 1.0], requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    (parameter * torch.tensor([2.0, -1.0])).sum().backward()
    whitened_step(optimizer.step, [parameter], [torch.tensor([3.0, 0.5])])
    torch.testing.assert_close(parameter.detach(), torch.tensor([1 - 0.1 * 9 * 2, 1 + 0.1 * 0.25]))


def test_a_whitened_step_of_adam_moves_each_coordinate_by_its_size() -> None:
    parameter = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=0.01, eps=1e-12)
    (parameter * torch.tensor([5.0, -0.1, 1.0])).sum().backward()
    whitened_step(optimizer.step, [parameter], [torch.tensor([2.0, 0.5, 1.0])])
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.02, 0.005, -0.01]))
