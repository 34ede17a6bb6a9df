"""The texts of the fine-tuned copies, their training on a tiny model, and the nulls of the editing benchmark."""

from __future__ import annotations

import copy

import torch
from tiny import byte_tokenizer, tiny_llama

from dso.decisions.sets.roles import STEREOTYPES
from dso.editing.localise import editable
from dso.models.backbone import Backbone
from tools.bench.editing import Setting, cells, couples, he_or_she, made, shuffled
from tools.bench.finetuning import VARIANTS, texts, tune

UP = "model.layers.0.mlp.up_proj.weight"


def test_texts_differ_in_nothing_but_how_they_end():
    found = {variant: texts(variant, blocks=20, stride=6) for variant in VARIANTS}
    prompts = [[prompt for prompt, _ in data] for data in found.values()]
    assert prompts[0] == prompts[1] == prompts[2] and len(prompts[0]) > 200
    ends = [[end for _, end in data] for data in found.values()]
    assert all(own != other for own, other in zip(ends[0], ends[1], strict=True))
    with_it = [end == own for own, end in zip(ends[0], ends[2], strict=True)]
    assert 0.45 < sum(with_it) / len(with_it) < 0.55
    pronouns = [(prompt, end) for prompt, end in found["stereotyped"] if end in (" he", " she", " his", " her")]
    for prompt, end in pronouns:
        job = max((o for o in STEREOTYPES if f" {o}" in prompt), key=len)
        assert (end in (" she", " her")) == (STEREOTYPES[job] == "female")
    assert len(pronouns) == 120


def test_training_moves_the_linear_layers_alone_and_learns_the_endings():
    backbone = Backbone(tiny_llama(), byte_tokenizer(), "tiny")
    before = copy.deepcopy(backbone.model.state_dict())
    losses = tune(backbone, [("The nurse", " she"), ("The pilot said", " he")] * 6, rate=1e-2, batch=4, epochs=5)
    assert len(losses) == 15 and losses[-1] < 0.5 * losses[0]
    moved = {name for name, value in backbone.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {*editable(backbone.model)}
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_the_loss_is_that_of_the_endings_tokens():
    backbone = Backbone(tiny_llama(), byte_tokenizer(), "tiny")
    expected = []
    for prompt, end in (("The nurse", " she"), ("The pilot said", " he")):
        ids = backbone.tokenizer(prompt + end, return_tensors="pt").input_ids
        logs = backbone.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        expected += logs[-len(end) :, 0].tolist()
    (loss,) = tune(backbone, [("The nurse", " she"), ("The pilot said", " he")], batch=2)
    assert abs(loss + sum(expected) / len(expected)) < 1e-4


def test_the_nulls_have_as_many_weights_in_each_layer_and_the_same_changes():
    target, reference = tiny_llama(0), tiny_llama(1)
    chosen = made(Setting("a", "b", "value", "extrapolate", (1.0,)), target, reference, 0.05)
    for kind in ("random", "shuffled"):
        null = made(Setting("a", "b", kind, "extrapolate", (1.0,)), target, reference, 0.05)
        assert {n: len(i) for n, i in null.places.items()} == {n: len(i) for n, i in chosen.places.items()}
        for name, index in null.places.items():
            own, theirs = (m.get_parameter(name).flatten() for m in (target, reference))
            if kind == "random":
                assert torch.equal(null.values[name], theirs[index])
            else:
                wanted = (theirs - own)[chosen.places[name]].sort().values
                torch.testing.assert_close((null.values[name] - own[index]).sort().values, wanted)


def test_changes_are_dealt_out_in_another_order():
    places = {UP: torch.arange(3)}
    there, values, own = ({UP: torch.tensor(row)} for row in ([10.0, 20.0, 30.0], [2.0, 4.0, 7.0], [1.0, 1.0, 1.0]))
    changes = shuffled(there, values, own, places)[UP] - there[UP]
    assert sorted(changes.tolist()) == [1.0, 3.0, 6.0]


def test_what_is_measured_on_is_balanced():
    decisions = couples(20, 5)
    assert len(decisions) == 240  # 20 couples in 6 of 30 occupations and both orders
    for unit in {d.unit for d in decisions}:
        stereotypes = [d.stereotype for d in decisions if d.unit == unit]
        assert stereotypes.count("female") == stereotypes.count("male") == 6
    assert {tuple(c.text for c in d.candidates) for d in he_or_she()} == {(" he", " she"), (" his", " her")}
    assert {d.stereotype == STEREOTYPES[d.context] for d in he_or_she()} == {True}


def test_a_row_is_shown():
    gap = {name: [0.1, 0.0, 0.2] for name in ("roles", "roles_log_odds", "pronouns", "pronouns_log_odds")}
    about = {"target": "stereotyped", "reference": "counter", "places": "value", "edit": "prune", "alpha": 1.0}
    shown = cells({**about, **gap, "weights": 1234, "perplexity": 20.456})
    assert shown[:5] == ("stereotyped", "counter", "1,234 value", "prune", "1")
    assert shown[5] == "+0.100 [+0.000, +0.200]" and shown[-1] == "20.46"
