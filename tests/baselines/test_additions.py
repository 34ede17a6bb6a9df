"""What adds a vector: CAA, ITI, FairSteer; and the probes behind two of them."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny
from baseline_task import tiny_task
from steered import logits
from tiny import tiny_llama

from dso.baselines import caa, fairsteer, iti
from dso.baselines.activations import answered, collect
from dso.baselines.baseline import BaselineError
from dso.baselines.fairsteer import GatedOperator
from dso.baselines.fitted import fitted
from dso.baselines.probes import accuracy, logistic


def test_caa_adds_the_mean_difference_of_answers_behind_a_layer() -> None:
    task = tiny_task()
    answers = answered(task)
    candidates = list(caa.propose(task))
    assert [c.label for c in candidates] == ["layer 0", "layer 0, reversed", "layer 1", "layer 1, reversed"]
    for number, candidate in enumerate(candidates):
        ((site, operator),) = candidate.steering.operators.items()
        assert site == f"model.layers.{number // 2}"
        states = collect(task.backbone, answers.texts, (site,))[site]
        wanted = states[~answers.stereotyped].mean(0) - states[answers.stereotyped].mean(0)  # one of each a decision
        torch.testing.assert_close(operator.b, -wanted if number % 2 else wanted)


def test_an_offset_behind_a_layer_is_one_behind_its_mlp() -> None:
    task, vector = tiny_task(), torch.linspace(-1, 1, 16)
    model = task.backbone.model
    seen = []
    for site in ("model.layers.0", "model.layers.0.mlp.down_proj"):
        with fitted(task, "bias", {site: {"b": vector}}).on(model, 0.7):
            seen.append(logits(model))
    torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-5)


def test_heads_are_shifted_along_their_means_by_their_spread() -> None:
    """One head: means (0, 0) and (3, 4), so theta = (0.6, 0.8); along it values -1, 1, 4, 6: their deviation 2.69."""
    x = torch.tensor([[[-0.6, -0.8], [0.6, 0.8], [2.4, 3.2], [3.6, 4.8]]])
    stereotyped = torch.tensor([True, True, False, False])
    spread = torch.tensor([-1.0, 1.0, 4.0, 6.0]).std(unbiased=False)
    shift = iti.head_shift(x, stereotyped, torch.tensor([True]))
    torch.testing.assert_close(shift, spread * torch.tensor([[0.6, 0.8]]))
    assert iti.head_shift(x, stereotyped, torch.tensor([False])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2", "OPT"])
def test_an_offset_behind_the_output_layer_is_a_shift_of_the_heads(architecture) -> None:
    """Also of a Conv1D, and of a layer with a bias."""
    model = tiny(architecture)
    site = list(iti.attention_outputs(model))[1]
    shift = torch.linspace(-1, 1, 16)
    seen = []
    module = model.get_submodule(site)
    if module.bias is not None:
        module.bias.data.fill_(0.5)  # which a new model has at 0
    hook = module.register_forward_pre_hook(lambda m, args: (args[0] + shift,))
    seen.append(logits(model))
    hook.remove()
    offset = iti.offset_behind(module, shift)
    hook = module.register_forward_hook(lambda m, args, output: output + offset)
    seen.append(logits(model))
    hook.remove()
    torch.testing.assert_close(*seen, atol=2e-5, rtol=2e-5)


def test_iti_finds_the_head_that_knows() -> None:
    """A model in which the second head of the last layer alone reads the answer: the others' outputs are constant."""
    task = tiny_task()
    with torch.no_grad():
        for layer in task.backbone.model.model.layers:
            layer.self_attn.v_proj.weight.zero_()
        value = task.backbone.model.model.layers[1].self_attn.v_proj.weight
        value.copy_(torch.eye(*value.shape))
    candidate = next(iter(iti.propose(task)))
    assert candidate.label == "1 heads"
    assert list(candidate.steering.operators) == ["model.layers.1.self_attn.o_proj"]


def test_a_probe_finds_a_planted_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2 == 0
    x = torch.randn(2, 200, 5, generator=generator)
    x[0, :, 3] += 6 * y + 2  # the first set tells the classes apart, along one unit; the second does not
    weight, intercept = logistic(x, y)
    assert weight[0].abs().argmax() == 3 and 4.0 < -intercept[0] / weight[0, 3] < 6.0  # between 2 and 8
    right = accuracy(x, y, 0, torch.arange(200))
    assert right[0] > 0.95 and right[1] < 0.75


def test_a_gate_opens_where_the_classifier_says_so() -> None:
    operator = GatedOperator(torch.tensor([1.0, 0.0]), torch.tensor(-0.5), torch.tensor([0.0, 4.0]))
    h = torch.tensor([[[1.0, 1.0], [0.25, 1.0]]])
    assert operator(h, 0.5).tolist() == [[[1.0, 3.0], [0.25, 1.0]]]
    assert operator.scaled(0.5)["b"].tolist() == [0.0, 2.0] and operator.scaled(0.5)["c"] == operator.c
    rows = operator(h.expand(2, 2, 2), torch.tensor([0.5, 1.0]).view(2, 1, 1))
    assert rows[:, 0, 1].tolist() == [3.0, 5.0]


def test_a_gate_needs_both_kinds_of_prompts() -> None:
    task = tiny_task()
    clear = task.decisions.select(kind="unambiguous")
    ambiguous = task.decisions.select(lambda d: d.ambiguous and d.context == "nurse")
    mixed = type(clear)((*clear[:4], *ambiguous[:4]), clear.groups)
    with pytest.raises(BaselineError, match="biased on every prompt or on none"):
        made = tiny_task(decisions=mixed)
        never = torch.tensor([[0.1, 0.9]]).log().expand_as(made.base)  # the nurse is a man
        next(iter(fairsteer.propose(type(made)(**{**vars(made), "base": never}))))


def test_steering_states_what_it_was_made_for() -> None:
    task = tiny_task()
    steering = next(iter(caa.propose(task))).steering
    assert (steering.config.base_model, steering.config.groups) == ("tiny", ("female", "male"))
    assert not any(value.requires_grad for value in steering.parameters())
    with pytest.raises(Exception, match="are not the ones trained on"):
        steering.attach(tiny_llama(seed=1))
