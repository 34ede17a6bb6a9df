"""Linear-AcT: the map of one unit, and maps that are fitted one after another."""

from __future__ import annotations

import torch
from baseline_task import last_states, tiny_task

from dso.baselines import linear_act
from dso.baselines.activations import answered, collect
from dso.baselines.linear_act import transport


def test_the_map_of_a_unit_by_hand() -> None:
    """Source 0, 2, 4 and target 4, 1, 1: w = (-2 * -1 + 0 * -1 + 2 * 2) / 8 = 0.75, b = 2 - 0.75 * 2 = 0.5."""
    w, b = transport(torch.tensor([[2.0], [0.0], [4.0]]), torch.tensor([[4.0], [1.0], [1.0]]))
    assert (w.item(), b.item()) == (0.75, 0.5)


def test_an_affine_image_is_found_whatever_the_order_of_its_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(50, 3, generator=generator)
    slope, offset = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([1.0, 0.0, -3.0])
    target = (slope * source + offset)[torch.randperm(50, generator=generator)]
    w, b = transport(source, target)
    torch.testing.assert_close(w, slope)
    torch.testing.assert_close(b, offset)
    moved = w * source + b
    torch.testing.assert_close((moved.mean(0), moved.std(0)), (target.mean(0), target.std(0)))


def test_a_unit_that_never_varies_is_shifted() -> None:
    w, b = transport(torch.full((4, 1), 2.0), torch.full((4, 1), 5.0))
    assert (w.item(), b.item()) == (1.0, 3.0)


def test_maps_one_after_another_move_every_site_to_the_targets_mean() -> None:
    """Each map moves the mean of what the mapped model gives there, so all means are right at once; of maps that are
    fitted to the base model the first site's mean alone is."""
    task = tiny_task()
    answers = answered(task, linear_act.DECISIONS)
    sources, targets = (answers.stereotyped.nonzero()[:, 0], (~answers.stereotyped).nonzero()[:, 0])
    in_order, at_once = linear_act.propose(task)
    assert (in_order.label, at_once.label) == ("one after another", "all at once")
    sites = tuple(in_order.steering.operators)
    base = collect(task.backbone, answers.texts, sites)
    off = {}
    moved_texts = [answers.texts[row] for row in sources.tolist()]
    for candidate in (in_order, at_once):
        with candidate.steering.on(task.backbone.model):
            moved = last_states(task.backbone.model, moved_texts, sites)
        differences = [moved[site].mean(0) - base[site][targets].mean(0) for site in sites]
        off[candidate.label] = [float(difference.abs().max()) for difference in differences]
    assert max(off["one after another"]) < 1e-4
    assert off["all at once"][0] < 1e-4 < 0.01 < max(off["all at once"])
