"""Layouts are measured: packed where it is exact, padded where that is, else rows of their own; sampling likewise."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import alone, assert_same, questions, tiny, tokens
from tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from dso.errors import UserError
from dso.models import sampling
from dso.models.backbone import Backbone
from dso.models.sampling import sample
from dso.models.scoring import score

SEQUENCE = {
    "vocab_size": 258, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 128,
    "init_std": 0.3, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1, "decoder_start_token_id": 2, "is_decoder": True,
    "is_encoder_decoder": False,
}  # fmt: skip
# What left padding changes the answers of: a recurrent state takes it in, learned positions count it.
UNPADDED = {
    "RWKV": ("RwkvConfig", {
        "vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16,
        "context_length": 128,
    }),
    "BART": ("BartConfig", SEQUENCE),
    "mBART": ("MBartConfig", SEQUENCE),
    "Marian": ("MarianConfig", SEQUENCE),
    "Pegasus": ("PegasusConfig", SEQUENCE),
    "PLBart": ("PLBartConfig", SEQUENCE),
    "Blenderbot": ("BlenderbotConfig", SEQUENCE),
}  # fmt: skip
# What takes no packed row, in ways of its own: inputs of another shape, an error, a prompt that is put before each row.
STRANGE = {
    "XLM": ("XLMConfig", "padded", {
        "vocab_size": 258, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "causal": True, "max_position_embeddings": 128,
        "dropout": 0.0, "attention_dropout": 0.0, "pad_index": 0,
    }),
    "ProphetNet": ("ProphetNetConfig", "single", {
        "vocab_size": 258, "hidden_size": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_encoder_layers": 2,
        "num_decoder_layers": 2, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2,
        "is_decoder": True, "add_cross_attention": False, "max_position_embeddings": 128, "dropout": 0.0,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 0, "is_encoder_decoder": False,
        "init_std": 0.3,
    }),
    "CPM-Ant": ("CpmAntConfig", "single", {
        "vocab_size": 258, "hidden_size": 16, "num_attention_heads": 2, "dim_head": 8, "dim_ff": 32,
        "num_hidden_layers": 2, "prompt_length": 4,
    }),
}  # fmt: skip


def unpadded(name: str) -> Backbone:
    kind, settings = UNPADDED[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).eval()
    return Backbone(model, byte_tokenizer(), name)


@torch.no_grad()
@pytest.mark.parametrize("name", UNPADDED)
def test_prompts_of_unequal_lengths_are_answered_as_each_by_itself(name: str) -> None:
    backbone = unpadded(name)
    assert backbone.layout == "padded"
    assert backbone.company == ("none" if name == "RWKV" else "equal")
    encoded = questions((7, 3, 5))
    assert_same(score(backbone.model, encoded, layout="padded", max_tokens=500), alone(backbone.model, encoded))
    # All the probability goes to one token, so that sampling shows what the model would say.
    backbone.model.get_output_embeddings().register_forward_hook(lambda module, args, output: output * 1000)
    prompts = [tokens(7, 1), tokens(3, 2), tokens(5, 3), tokens(3, 4)]
    wanted = [sample(backbone, [prompt], max_new_tokens=3)[0] for prompt in prompts]
    assert sample(backbone, prompts, max_new_tokens=3) == wanted


@torch.no_grad()
@pytest.mark.parametrize("name", STRANGE)
def test_a_model_of_another_kind_is_scored_alike_whatever_stands_beside_a_decision(name: str) -> None:
    kind, layout, settings = STRANGE[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).eval()
    backbone = Backbone(model, byte_tokenizer(), name)
    assert backbone.layout == layout and "not packed: " in (backbone.layout_line() or "")
    encoded = questions((7, 3, 5))
    found = score(model, encoded, layout=layout, max_tokens=500)
    for row, e in enumerate(encoded):
        own = score(model, [e], layout=layout, max_tokens=500).log_probs[0]
        torch.testing.assert_close(found.log_probs[row, : len(own)], own, atol=2e-5, rtol=2e-5)


def test_models_that_take_left_padding_are_answered_together(monkeypatch: pytest.MonkeyPatch) -> None:
    portions = []
    write = sampling._write
    monkeypatch.setattr(
        sampling, "_write", lambda b, prompts, *rest: portions.append(len(prompts)) or write(b, prompts, *rest)
    )
    backbone = Backbone(tiny("Llama"), byte_tokenizer())
    sample(backbone, [tokens(7, 1), tokens(3, 2), tokens(5, 3)], max_new_tokens=1)
    assert backbone.company == "any" and portions == [3]


def test_rows_side_by_side_hold_two_gigabytes_of_keys_and_values_at_most() -> None:
    backbone = Backbone(tiny("Llama"), byte_tokenizer())
    # Keys and values x layers x heads of them x head width x bytes.
    assert sampling.token_bytes(backbone.model) == 2 * 2 * 1 * 8 * 4
    eight_billion = 2 * 32 * 8 * 128 * 2
    backbone.model.config.update({"num_hidden_layers": 32, "num_key_value_heads": 8, "num_attention_heads": 32})
    backbone.model.config.head_dim = 256  # of four bytes, where bfloat16 has two
    assert sampling.token_bytes(backbone.model) == 4 * eight_billion
    prompts, order = [(1,) * 64] * 100, list(range(100))
    sizes = [len(rows) for rows in sampling._portions(backbone, prompts, order, 200, None)]
    assert sizes == [14] * 7 + [2]  # 2e9 / (524288 * 264) is 14.4


class Batch(transformers.LlamaForCausalLM):
    """An architecture whose answers depend on what stands beside them."""

    def forward(self, input_ids, **options):
        output = super().forward(input_ids, **options)
        output.logits = output.logits + input_ids.float().mean()
        output.logits[..., 7] += input_ids.shape[1]
        return output


@torch.no_grad()
def test_a_model_whose_answers_depend_on_the_batch_gets_rows_of_their_own() -> None:
    torch.manual_seed(0)
    backbone = Backbone(Batch(tiny_llama().config).eval(), byte_tokenizer(), "batch")
    assert backbone.layout == "single"
    assert "batch: prompts are scored in rows of their own, not packed: padded ones change" in backbone.layout_line()
    encoded = questions((7, 3, 5))
    found = score(backbone.model, encoded, layout=backbone.layout, max_tokens=500, next_token=True, hidden=True)
    for number, e in enumerate(encoded):
        for column, candidate in enumerate(e.candidates):
            row = torch.tensor([[*e.prompt, *candidate[:-1]]])
            table = backbone.model(row).logits[0].log_softmax(-1)[len(e.prompt) - 1 :]
            wanted = sum(table[place, token] for place, token in enumerate(candidate))
            assert found.log_probs[number, column].item() == pytest.approx(float(wanted), rel=1e-4)


class Broken(transformers.LlamaForCausalLM):
    """An architecture that cannot be run at all."""

    def forward(self, *args, **options):
        raise NotImplementedError("needs a kernel that is not there")


def test_a_model_that_cannot_be_run_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="Broken cannot be scored: needs a kernel that is not there"):
        Backbone(Broken(tiny_llama().config), byte_tokenizer())


def test_running_out_of_memory_is_no_verdict_on_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args, **options):
        raise torch.OutOfMemoryError("out of memory")

    model = tiny_llama()
    monkeypatch.setattr(type(model), "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        Backbone(model, byte_tokenizer())


@pytest.mark.slow
def test_the_embedded_model_packs_in_bfloat16_but_not_with_wrong_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone.load("smollm2-135m", dtype="bfloat16")
    assert backbone.layout == "packed" and backbone.layout_line() is None
    from dataclasses import replace

    from dso.models import forward

    pack = forward.pack

    def wrong(sequences):
        row = pack(sequences)
        return replace(row, position_ids=torch.arange(row.input_ids.shape[1])[None])

    monkeypatch.setattr(forward, "pack", wrong)
    refused = Backbone(backbone.model, backbone.tokenizer, "wrong")
    assert refused.layout == "padded" and "packed ones change its answers (by 0.77" in refused.layout_line()
