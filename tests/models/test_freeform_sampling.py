"""Sampling answers: from the model's own distribution, each prompt computed once; the KL a token of what was said."""

from __future__ import annotations

import pytest
import torch
from answering import speaking_backbone
from architectures import tiny, tokens
from tiny import byte_tokenizer

from dso.models import sampling
from dso.models.backbone import Backbone
from dso.models.sampling import end_tokens, sample, token_kl
from dso.steering.model import Steering

SHARED = tokens(4, 9)
PROMPTS = [tokens(5, 1), SHARED + tokens(5, 2), tokens(5, 1), tokens(5, 1), tokens(1, 4), SHARED + tokens(2, 3)]


def drawn(backbone: Backbone, seed: int = 0, **options) -> list[list[int]]:
    torch.manual_seed(seed)
    return sample(backbone, options.pop("prompts", PROMPTS), **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Gemma2", "GPT-2", "Falcon-ALiBi", "Mamba"])
def test_sharing_prompts_changes_no_answer(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(tiny(architecture), byte_tokenizer())
    shared = drawn(backbone)
    monkeypatch.setattr(sampling, "_prefill", lambda *_: None)
    assert drawn(backbone) == shared
    assert len({tuple(shared[row]) for row in (0, 2, 3)}) == 3  # the same prompt, each time another answer


def test_shared_prompts_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(tiny("Llama"), byte_tokenizer())
    assert backbone.company  # found out with passes of its own
    lengths = []
    hook = backbone.model.model.embed_tokens.register_forward_hook(
        lambda _, __, out: lengths.append(out.shape[0] * out.shape[1])
    )
    drawn(backbone, prompts=[SHARED + tokens(5, seed) for seed in (1, 2, 3) for _ in range(10)])
    hook.remove()
    # One tree of the four shared tokens and three times four own ones; then a token an answer and step.
    assert lengths == [4 + 3 * 4, 30, 30, 30, 30]


def test_answers_are_drawn_from_the_models_distribution() -> None:
    backbone = speaking_backbone()
    prompt = tokens(5, 1)
    with torch.no_grad():
        logits = backbone.model(torch.tensor([prompt])).logits[0, -1].float()
    for temperature in (1.0, 0.5):
        expected = (logits / temperature).softmax(-1)
        count = 4000
        answers = drawn(backbone, prompts=[prompt] * count, max_new_tokens=1, temperature=temperature)
        found = torch.bincount(torch.tensor([answer[0] for answer in answers]), minlength=258) / count
        for token in expected.topk(5).indices.tolist():
            spread = float((expected[token] * (1 - expected[token]) / count) ** 0.5)
            assert abs(float(found[token] - expected[token])) < 4.5 * spread


def test_the_models_own_generation_settings_stay_out() -> None:
    plain = drawn(speaking_backbone())
    backbone = speaking_backbone()
    settings = backbone.model.generation_config
    settings.top_k, settings.temperature, settings.repetition_penalty, settings.max_length = 1, 0.1, 9.0, 3
    assert drawn(backbone) == plain
    assert backbone.model.generation_config is settings


def test_an_answer_ends_with_an_end_token() -> None:
    backbone = speaking_backbone()
    ends = set(range(2, 130))
    backbone.model.generation_config.eos_token_id = sorted(ends)
    assert set(end_tokens(backbone)) == ends | {1}  # the tokenizer's is 1
    answers = drawn(backbone, prompts=[tokens(5, 1)] * 60, max_new_tokens=6)
    assert {len(answer) for answer in answers} >= {1, 2, 3}
    for answer in answers:
        assert not ends & set(answer[:-1])
        assert answer[-1] in {*ends, 1} or len(answer) == 6


def test_the_order_and_the_portions_are_kept() -> None:
    backbone = speaking_backbone()
    backbone.model.generation_config.eos_token_id = 1
    with torch.no_grad():
        backbone.model.model.norm.weight.mul_(50.0)  # one answer has all the probability
    whole = drawn(backbone)
    assert drawn(backbone, max_rows=2) == whole
    assert drawn(backbone, prompts=PROMPTS[::-1]) == whole[::-1]


def test_the_kl_of_answers_is_that_of_the_definition() -> None:
    backbone = speaking_backbone()
    steering = Steering.for_model(backbone.model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in steering.parameters():
            parameter.normal_(0, 0.1)
    handle = steering.attach(backbone.model, 0.5)
    answers = [tokens(length, 50 + place) for place, length in enumerate((1, 3, 2, 3, 4, 2))]
    found = token_kl(backbone, handle, PROMPTS, answers)
    assert handle.scale == 0.5
    for prompt, answer, value in zip(PROMPTS, answers, found, strict=True):
        tables = []
        for scale in (0.5, 0.0):
            handle.scale = scale
            with torch.no_grad():
                logits = backbone.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            tables.append(logits.double().log_softmax(-1))
        expected = (tables[0].exp() * (tables[0] - tables[1])).sum(-1).mean()
        assert value == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    assert min(found) > 1e-4
