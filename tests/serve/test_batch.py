"""Rows that are written side by side have the logits that each has alone."""

from __future__ import annotations

import pytest
import torch
from serving import strong_steering, tiny_backbone
from tiny import byte_tokenizer
from transformers import MistralConfig, MistralForCausalLM, RwkvConfig, RwkvForCausalLM

from dso.errors import UserError
from dso.models.backbone import Backbone
from dso.serve.batch import Batch, keeps_only_states
from dso.serve.prefixes import Prefixes

ROWS = ((range(10, 27), 0.0), (range(40, 43), 1.0), (range(90, 131), 0.5), ((7,), 2.0))
GOES_ON = (5, 9, 200, 31, 77, 8, 60, 61)


def windowed() -> Backbone:
    """A model whose attention looks back over 6 tokens."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=6, max_position_embeddings=512, initializer_range=0.3, eos_token_id=1,
    )  # fmt: skip
    return Backbone(MistralForCausalLM(config), byte_tokenizer(), "windowed")


def alone(backbone: Backbone, handle, tokens, scale: float) -> torch.Tensor:
    """(V,) logits behind a row, without a cache or company."""
    handle.scale = scale
    with torch.no_grad():
        return backbone.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("make", [tiny_backbone, windowed])
def test_rows_that_join_and_leave_have_the_logits_that_they_have_alone(make) -> None:
    backbone = make()
    handle = strong_steering(backbone.model).attach(backbone.model, 0.0)
    batch = Batch(backbone, handle)
    assert not batch.alone
    written: list[tuple[list[int], float]] = []

    def check(logits: torch.Tensor, rows: list[tuple[list[int], float]]) -> None:
        expected = torch.stack([alone(backbone, handle, *row) for row in rows])
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)

    def join(*numbers: int) -> None:
        new = [(list(ROWS[number][0]), ROWS[number][1]) for number in numbers]
        logits = batch.join([tokens for tokens, _ in new], [scale for _, scale in new])
        check(logits[:, 0], new)
        written.extend(new)

    def step(number: int) -> None:
        for tokens, _ in written:
            tokens.append(GOES_ON[number])
        check(batch.step([GOES_ON[number]] * len(written)), written)

    join(0)
    step(0)
    join(1, 2, 2)  # a prompt that is given twice is read once
    step(1)
    step(2)
    batch.keep([0, 2])
    written[:] = [written[0], written[2]]
    step(3)
    join(3)
    for number in range(4, 8):
        step(number)
    batch.keep([2])
    written[:] = written[2:]
    step(0)
    batch.keep([])
    assert len(batch) == 0
    written.clear()
    join(2)


@pytest.mark.parametrize("make", [tiny_backbone, windowed])
def test_the_beginning_of_a_prompt_is_not_read_again_at_the_same_scale(make) -> None:
    backbone = make()
    handle = strong_steering(backbone.model).attach(backbone.model, 0.0)
    batch = Batch(backbone, handle)
    read: list[tuple[int, ...]] = []
    backbone.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape)))

    def join(prompts: list[list[int]], scales: list[float]) -> list[tuple[int, ...]]:
        read.clear()
        logits = batch.join(prompts, scales)
        passes = list(read)
        expected = torch.stack([alone(backbone, handle, *row) for row in zip(prompts, scales, strict=True)])
        torch.testing.assert_close(logits[:, 0], expected, atol=2e-5, rtol=1e-5)
        return passes

    shared = list(range(20, 50))
    assert join([[*shared, 3]], [0.5]) == [(1, 31)]
    assert join([[*shared, 3]], [0.5]) == [(1, 1)]  # all of it is known, and its last token is read for its logits
    assert join([[*shared, 3]], [1.0]) == [(1, 31)]  # nothing is known at another scale
    assert join([[*shared, 4, 5], [*shared[:20], 9], [7, 8]], [0.5, 1.0, 0.5]) == [(1, 2), (2, 2)]
    logits = batch.step([11] * 6)
    torch.testing.assert_close(logits[4], alone(backbone, handle, [*shared[:20], 9, 11], 1.0), atol=2e-5, rtol=1e-5)


def test_the_handle_is_turned_only_where_scales_change() -> None:
    backbone = tiny_backbone()
    handle = strong_steering(backbone.model).attach(backbone.model, 0.0)
    batch = Batch(backbone, handle)
    batch.join([[5], [6]], [0.5, 1.0])
    kept = handle.coefficient
    batch.step([7, 8])
    assert handle.coefficient is kept
    handle.scale = 2.0  # whoever ran between two steps
    torch.testing.assert_close(batch.step([9, 9])[1], alone(backbone, handle, [6, 8, 9], 1.0), atol=2e-5, rtol=1e-5)
    batch.keep([1])
    torch.testing.assert_close(batch.step([9])[0], alone(backbone, handle, [6, 8, 9, 9], 1.0), atol=2e-5, rtol=1e-5)


def test_prefixes_that_were_used_longest_ago_make_room() -> None:
    def states(length: int) -> list[tuple[torch.Tensor, ...]]:
        return [(torch.arange(length).float().view(1, 1, length, 1),) * 2]  # 8 bytes a token

    first, second, third = (tuple(range(start, start + 20)) for start in (0, 100, 200))
    prefixes = Prefixes(room=2 * 20 * 8)
    for prompt in (first, second):
        prefixes.keep(prompt, 0.5, states(20))
    known = prefixes.find((*first[:18], 99, 98), 0.5)
    assert known is not None and known[0][0].flatten().tolist() == list(range(18))
    assert prefixes.find(first, 0.25) is None
    assert prefixes.find((*first[:15], 99), 0.5) is None  # too short to be worth it
    prefixes.keep(third, 0.5, states(20))
    assert prefixes.find(second, 0.5) is None
    assert prefixes.find(first, 0.5)[0][0].shape[2] == 19  # not its last token
    prefixes.keep(tuple(range(300, 345)), 0.5, states(45))  # larger than all the room
    assert prefixes.find(third, 0.5) is not None


def test_logits_of_a_whole_prompt() -> None:
    backbone = tiny_backbone()
    handle = strong_steering(backbone.model).attach(backbone.model, 0.0)
    prompt = list(range(30, 40))
    logits = Batch(backbone, handle).join([prompt], [0.5], read=10)[0]
    for length in (1, 4, 10):
        expected = alone(backbone, handle, prompt[:length], 0.5)
        torch.testing.assert_close(logits[length - 1], expected, atol=2e-5, rtol=1e-5)


def test_a_model_without_keys_and_values_is_refused() -> None:
    model = RwkvForCausalLM(
        RwkvConfig(vocab_size=32, hidden_size=8, num_hidden_layers=2, attention_hidden_size=8)
    ).eval()
    with pytest.raises(UserError, match="RwkvForCausalLM cannot be served"):
        keeps_only_states(model)


def test_a_model_whose_rows_change_one_another_takes_one_at_a_time() -> None:
    backbone = tiny_backbone()
    backbone.layout = "single"  # what is found out about such a model
    batch = Batch(backbone, strong_steering(backbone.model).attach(backbone.model, 1.0))
    assert batch.alone
    logits = batch.join([[5, 6, 7]], [0.5])
    torch.testing.assert_close(logits[0, 0], alone(backbone, batch.handle, [5, 6, 7], 0.5), atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="one row at a time"):
        batch.join([[5]], [0.5])
    stepped = batch.step([8])
    torch.testing.assert_close(stepped[0], alone(backbone, batch.handle, [5, 6, 7, 8], 0.5), atol=2e-5, rtol=1e-5)
