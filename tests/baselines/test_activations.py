"""What the fitted baselines read of a model, and which answers they contrast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import tiny
from baseline_task import last_states, tiny_task, without_stereotypes
from cases import CASES
from tiny import byte_tokenizer, tiny_llama
from torch import Tensor

from dso.baselines.activations import Answered, answered, biased, collect, in_order, prompts
from dso.baselines.baseline import BaselineError
from dso.baselines.places import attention_outputs, by_depth, decoder_layers, stretches
from dso.decisions.decision import DecisionSet
from dso.models.backbone import Backbone
from dso.steering.sites import resolve_sites


@pytest.mark.parametrize("layout", ["packed", "padded", "single"])
def test_the_last_token_of_each_text_is_read_in_every_layout(layout) -> None:
    task = tiny_task(Backbone(tiny_llama(), byte_tokenizer(), "tiny", layout=layout))
    answers = answered(task, 8)
    model = task.backbone.model
    found = collect(task.backbone, answers.texts, ("model.layers.0", "model.layers.1"))
    wanted = last_states(model, answers.texts, tuple(found))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    given = collect(task.backbone, answers.texts, ("model.layers.1",), inputs=True)
    torch.testing.assert_close(given["model.layers.1"], found["model.layers.0"], atol=2e-5, rtol=0)


def test_a_text_is_the_prompt_and_the_whole_answer() -> None:
    task = tiny_task()
    answers = answered(task, 4)
    tokenizer = task.backbone.tokenizer
    for text, group, decision, stereotyped in zip(
        answers.texts, answers.groups.tolist(), answers.decisions.tolist(), answers.stereotyped.tolist(), strict=True
    ):
        asked = task.decisions[decision]
        candidate = next(c for c in asked.candidates if c.group == task.decisions.groups[group])
        assert tokenizer.decode(text.prompt) == asked.prompt + candidate.text
        assert stereotyped == (candidate.group == asked.stereotype)


def test_questions_are_drawn_with_all_their_orders_by_the_seed() -> None:
    first, again, other = (answered(tiny_task(seed=seed), 8) for seed in (0, 0, 1))
    decisions = tiny_task().decisions
    assert first.decisions.tolist() == again.decisions.tolist() != other.decisions.tolist()
    asked = [decisions[index] for index in first.decisions.unique().tolist()]
    assert len(asked) == 8 and all(decision.ambiguous for decision in asked)
    assert len({(decision.unit, decision.context) for decision in asked}) == 4


def test_differences_of_answers_are_taken_within_a_decision() -> None:
    """Two decisions; of the second one three answers, one of them stereotyped."""
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0], [6.0, 0.0], [0.0, 3.0]])
    answers = Answered(
        texts=(),
        groups=torch.tensor([0, 1, 0, 1, 2]),
        decisions=torch.tensor([4, 4, 7, 7, 7]),
        stereotyped=torch.tensor([True, False, False, True, False]),
    )
    assert answers.pairs(x).tolist() == [[2.0, 4.0], [-6.0, 1.5]]
    assert answers.differences(x).tolist() == [[-1, -2], [1, 2], [-2, -1], [4, -1], [-2, 2]]
    assert answers.group_means(x).tolist() == [[0.5, 0.0], [4.5, 2.0], [0.0, 3.0]]
    sources, targets = answers.matched()
    assert (sources.tolist(), targets.tolist()) == ([0, 3, 3], [1, 2, 4])


def test_where_no_context_is_stereotyped_it_is_what_the_base_model_prefers() -> None:
    task = tiny_task()
    task = replace(task, decisions=without_stereotypes(task.decisions))
    share = {context: [] for context in task.decisions.contexts}
    for decision, row in zip(task.decisions, task.base.exp().tolist(), strict=True):
        if decision.ambiguous:
            share[decision.context].append(row[0])  # the woman's
    answers = answered(task)
    for index, group, stereotyped in zip(
        answers.decisions.tolist(), answers.groups.tolist(), answers.stereotyped.tolist(), strict=True
    ):
        own = share[task.decisions[index].context]
        favourite = 0 if sum(own) / len(own) > 0.5 else 1
        assert stereotyped == (group == favourite)
    with pytest.raises(BaselineError, match="no ambiguous decision offers a stereotyped group"):
        answered(replace(task, base=torch.full_like(task.base, 0.5).log()))


def test_a_prompt_is_biased_where_the_stereotyped_group_has_more_than_its_share() -> None:
    task = tiny_task()
    indices, labels = biased(task, 24)
    clear = [not task.decisions[index].ambiguous for index in indices]
    assert (len(indices), sum(clear)) == (24, 8)
    for index, unambiguous, label in zip(indices, clear, labels.tolist(), strict=True):
        decision, row = task.decisions[index], task.base[index].exp()
        place = [c.group for c in decision.candidates].index(decision.stereotype or "female")
        assert label == (not unambiguous and row[place] > 0.5)
    texts = prompts(task, indices)
    assert task.backbone.tokenizer.decode(texts[0].prompt) == task.decisions[indices[0]].prompt


def test_a_site_is_fitted_on_what_the_changed_sites_before_it_give() -> None:
    """The first layer's output is doubled: the second rule sees what a doubled first layer leads to."""
    task = tiny_task()
    answers = answered(task, 8)
    model = task.backbone.model
    seen: dict[str, Tensor] = {}

    def rule(site: str, last: Tensor):
        seen[site] = last
        return (lambda values: 2 * values) if site == "model.layers.0" else (lambda values: values)

    in_order(task.backbone, answers.texts, ("model.layers.0", "model.layers.1"), rule)
    hook = model.model.layers[0].register_forward_hook(lambda m, a, output: 2 * output)
    wanted = last_states(model, answers.texts, ("model.layers.1",))
    hook.remove()
    torch.testing.assert_close(seen["model.layers.1"], wanted["model.layers.1"], atol=5e-5, rtol=0)
    torch.testing.assert_close(
        seen["model.layers.0"], collect(task.backbone, answers.texts, ("model.layers.0",))["model.layers.0"]
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_and_heads_of_other_architectures() -> None:
    assert decoder_layers(tiny("GPT-2")) == ("transformer.h.0", "transformer.h.1")
    assert attention_outputs(tiny("GPT-2")) == {f"transformer.h.{n}.attn.c_proj": 2 for n in range(2)}
    assert attention_outputs(tiny("OPT")) == {f"model.decoder.layers.{n}.self_attn.out_proj": 2 for n in range(2)}
    layers = tuple(f"layer {n}" for n in range(10))
    assert by_depth(layers, (0.5, 0.55, 1.0, 0.0)) == ("layer 5", "layer 9", "layer 0")
    assert stretches(layers)["middle third"] == ("layer 3", "layer 4", "layer 5")
    assert stretches(layers[:1]) == dict.fromkeys(stretches(layers), layers[:1])


def test_a_model_without_a_place_is_refused_in_one_line() -> None:
    with pytest.raises(BaselineError, match="Mamba.* has no attention output layers"):
        attention_outputs(tiny("Mamba"))
    model = tiny_llama()
    model.config.num_hidden_layers = 3
    with pytest.raises(BaselineError, match="LlamaForCausalLM has no list of 3 decoder layers"):
        decoder_layers(model)
    task = tiny_task(Backbone(tiny("Bloom"), byte_tokenizer(), "bloom"))
    with pytest.raises(BaselineError, match=r"module 'transformer.h.0' gives a tuple, expected one tensor"):
        collect(task.backbone, answered(task, 4).texts, ("transformer.h.0",))


@pytest.mark.parametrize("name", ["LLaVA", "Gemma3-VL", "Qwen2.5-VL"])
def test_prompts_with_images_are_read(name) -> None:
    """Behind a prompt the final norm gives what scoring says the output layer reads; answers are as when read alone."""
    backbone = CASES[name].backbone()
    decisions = DecisionSet(CASES[name].decisions())
    task = tiny_task(backbone, decisions)
    site = next(site for site in reversed(tuple(resolve_sites(backbone.model))))
    texts = prompts(task, range(len(decisions)))
    with torch.no_grad():
        wanted = backbone.score(list(decisions), hidden=True).hidden
    torch.testing.assert_close(collect(backbone, texts, (site,))[site], wanted, atol=2e-5, rtol=1e-4)
    answers = answered(task)
    together = collect(backbone, answers.texts, (site,))[site]
    alone = torch.cat([collect(backbone, [text], (site,))[site] for text in answers.texts])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
    with pytest.raises(BaselineError, match="images are not read in one pass"):
        in_order(backbone, answers.texts, (site,), lambda site, last: lambda values: values)
