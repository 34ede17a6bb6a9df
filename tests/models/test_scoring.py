"""Packed rows, padded rows and a plain loop over single prompts give the same numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from architectures import alone, assert_same, questions, tiny, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from dso.models import scoring
from dso.models.encoded import Encoded
from dso.models.scores import Scores, Scoring
from dso.models.scoring import score

PACKED = (
    "Llama", "Mistral", "Mixtral", "Qwen3", "Gemma2", "Gemma3", "Phi3", "OLMo2", "Llama4", "GPT-2", "GPT-J", "GPT-Neo",
    "GPT-NeoX", "OPT", "Falcon",
)  # fmt: skip
WINDOWED = ("Mistral", "Gemma2", "Gemma3", "GPT-Neo", "Llama4")
NOT_PACKED = ("Falcon-ALiBi", "Bloom", "MPT", "Mamba")


@torch.no_grad()
@pytest.mark.parametrize("architecture", PACKED)
def test_packed_and_padded_equal_the_single_prompts(architecture):
    model = tiny(architecture)
    encoded = questions((7, 3, 5, 7))
    wanted = alone(model, encoded)
    assert wanted.log_probs.isinf().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]
    for layout in ("packed", "padded", "single"):
        for max_tokens in (16, 60):
            found = score(
                model,
                encoded,
                layout=layout,
                max_tokens=max_tokens,
                row_limit=16 if architecture in WINDOWED else None,
                next_token=True,
                hidden=True,
            )
            assert_same(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("architecture", NOT_PACKED)
def test_padded_rows_serve_where_packing_cannot(architecture):
    model = tiny(architecture)
    encoded = questions((7, 3, 5))
    assert_same(
        score(model, encoded, layout="padded", max_tokens=60, next_token=True, hidden=True), alone(model, encoded)
    )


@torch.no_grad()
@pytest.mark.parametrize("architecture", WINDOWED)
def test_decisions_beyond_the_window_leave_the_packed_rows(architecture, monkeypatch):
    model = tiny(architecture)
    encoded = questions((5, 40, 4, 30, 14))  # the window is 16
    wanted = alone(model, encoded)
    wrong = score(model, encoded, layout="packed", max_tokens=500)
    assert (wrong.log_probs - wanted.log_probs).nan_to_num(0, 0, 0).abs().max() > 0.05

    packed_rows, padded_rows = [], []
    monkeypatch.setattr(scoring, "run_packed", spy(scoring.run_packed, packed_rows))
    monkeypatch.setattr(scoring, "run_padded", spy(scoring.run_padded, padded_rows))
    found = score(model, encoded, layout="packed", max_tokens=500, row_limit=16, next_token=True, hidden=True)
    assert_same(found, wanted)
    # Prompts of 5 and 4 tokens are packed; that of 14 has a tree of 14 + 0 + 1 + 2 = 17.
    assert [sorted(map(len, row)) for row in packed_rows] == [[4, 4, 5, 5, 6, 6]]
    assert sorted(length for row in padded_rows for length in map(len, row)) == [14, 15, 16, 30, 31, 40, 41, 42]


def spy(function, seen):
    def record(model, sequences, starts, hidden):
        seen.append(sequences)
        return function(model, sequences, starts, hidden)

    return record


@pytest.mark.parametrize("layout", ["packed", "padded", "single"])
def test_gradients_equal_those_of_the_single_prompts(layout):
    def gradients(run) -> dict[str, torch.Tensor]:
        model = tiny("Llama")
        scores = run(model, questions((6, 4, 5)))
        policy = scores.policy().exp()
        (policy[:, 0].sum() + (scores.next_token.exp() * scores.next_token).sum()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    wanted = gradients(alone)
    found = gradients(lambda model, e: score(model, e, layout=layout, max_tokens=20, next_token=True))
    assert wanted["model.norm.weight"].abs().max() > 0.01
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["packed", "padded", "single"])
def test_a_candidate_may_begin_or_end_another(layout):
    model = tiny("Llama")
    encoded = [Encoded((5, 6), ((7,), (7, 8), (7, 8, 9), (3, 8))), Encoded((5, 6, 7), ((8, 9), (8,)))]
    found = score(model, encoded, layout=layout, max_tokens=100, next_token=True)
    assert_same(found, alone(model, encoded))
    # p(7, then neither 8 nor 8 9) + p(7 8, then no 9) + p(7 8 9) = p(7)
    assert found.log_probs[0, :3].exp().sum() == pytest.approx(float(found.next_token[0, 7].exp()), rel=1e-5)


@torch.no_grad()
def test_a_shared_prompt_is_run_once():
    model = tiny("Llama")
    sizes = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: sizes.append(output.shape[:2]))
    prompt = tokens(20, 1)
    encoded = [Encoded((*prompt, last), ((1, 2), (3, 4), (5,))) for last in (10, 11, 12)]
    score(model, encoded, layout="packed", max_tokens=100)
    assert sizes == [(1, 29)]  # 20 of the prompt, then three times: its last token and the first of two candidates
    sizes.clear()
    score(model, encoded, layout="padded", max_tokens=100)
    assert sizes == [(3, 22)] * 3


@torch.no_grad()
@pytest.mark.parametrize("layout", ["packed", "padded", "single"])
def test_the_order_is_kept_whatever_the_batches(layout):
    model = tiny("GPT-2")
    encoded = questions((9, 3, 12, 4, 9, 3, 7, 5))
    whole = score(model, encoded, layout=layout, max_tokens=10_000, next_token=True, hidden=True)
    for max_tokens in (1, 25, 60):
        assert_same(
            score(model, encoded, layout=layout, max_tokens=max_tokens, next_token=True, hidden=True), whole, 5e-5
        )
    turned = score(model, encoded[::-1], layout=layout, max_tokens=25)
    torch.testing.assert_close(turned.log_probs.flip(0), whole.log_probs, atol=5e-5, rtol=5e-5)


@torch.no_grad()
def test_padding_with_a_token_that_occurs_does_no_harm():
    # Rows are padded with token 0, here the end token: real ones in a prompt count, padded ones do not.
    model = tiny("GPT-2", eos_token_id=0, pad_token_id=0)
    encoded = [Encoded((0, 5, 0), ((0, 7), (7,))), Encoded((5, 0), ((0,), (9, 0, 9))), Encoded((4,) * 9, ((1,), (2,)))]
    wanted = alone(model, encoded)
    for layout in ("packed", "padded", "single"):
        assert_same(score(model, encoded, layout=layout, max_tokens=500, next_token=True), wanted)


@torch.no_grad()
def test_half_precision_gives_float32_scores():
    model = tiny("Llama").to(torch.bfloat16)
    encoded = questions((7, 3))
    wanted = alone(model, encoded)
    for layout in ("packed", "padded", "single"):
        found = score(model, encoded, layout=layout, max_tokens=60, next_token=True, hidden=True)
        assert found.log_probs.dtype == found.next_token.dtype == found.hidden.dtype == torch.float32
        assert_same(found, wanted, 0.3)


class NoKeep(LlamaForCausalLM):
    """An architecture that takes ``logits_to_keep`` and knows nothing of it."""

    def forward(self, *args, logits_to_keep=0, **kwargs):
        return super().forward(*args, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["packed", "padded", "single"])
def test_logits_of_every_position_are_narrowed_to_those_that_are_read(layout):
    torch.manual_seed(0)
    model = NoKeep(LlamaConfig(**tiny("Llama").config.to_diff_dict())).eval()
    encoded = questions((7, 3))
    found = score(model, encoded, layout=layout, max_tokens=60, next_token=True, hidden=True)
    assert_same(found, alone(model, encoded))


def test_what_was_not_asked_for_is_none_and_hidden_has_no_gradient():
    model = tiny("Llama")
    plain = score(model, questions((3,)), layout="packed", max_tokens=60)
    assert plain.next_token is None and plain.hidden is None
    asked = score(model, questions((3,)), layout="packed", max_tokens=60, next_token=True, hidden=True)
    assert asked.log_probs.requires_grad and asked.next_token.requires_grad and not asked.hidden.requires_grad
    with pytest.raises(ValueError, match="no decisions"):
        score(model, [], layout="packed", max_tokens=60)


def test_policy_and_answer_mass_by_hand():
    ln = math.log
    scores = Scores(
        torch.tensor([[ln(0.2), ln(0.04), -torch.inf], [ln(0.1), ln(0.1), ln(0.2)]]),
        torch.tensor([[1, 2, 1], [1, 1, 1]]),
    )
    torch.testing.assert_close(scores.policy().exp(), torch.tensor([[5 / 6, 1 / 6, 0], [0.25, 0.25, 0.5]]))
    # 0.04 over two tokens is 0.2 a token
    scores = replace(scores, scoring=Scoring(length_normalised=True))
    torch.testing.assert_close(scores.policy().exp(), torch.tensor([[0.5, 0.5, 0], [0.25, 0.25, 0.5]]))
    torch.testing.assert_close(scores.answer_mass(), torch.tensor([0.24, 0.4]))


def test_what_has_to_be_run_leaves_out_last_tokens():
    assert Encoded((1, 2), ((3,), (4, 5, 6))).sequences() == [(1, 2), (1, 2, 4, 5)]
