"""Adapters in PEFT itself: equal to the hooks for several families, several at once, mixed in one batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import tiny
from exporting import IDS, hooked, moved, steering_of
from peft import PeftModel

from dso.errors import UserError
from dso.exports.lora import lora_plan
from dso.exports.peft import write_ln_tuning, write_lora

ROUNDING = 1e-5


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("Llama", "scale"), ("Qwen2", "scale"), ("Qwen3", "scale"), ("Gemma2", "scale"), ("Gemma3", "scale"),
        ("Llama", "low_rank"), ("Phi3", "affine"), ("GPT-2", "affine"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_lora_does_in_peft_what_the_hooks_do(name: str, operator: str, tmp_path: Path) -> None:
    model = tiny(name).double()  # so that what differs is not how this machine's layers round
    base = model(IDS).logits
    plan = lora_plan(moved(model, operator, slopes=3), model, allow_partial=True)
    assert plan.rank == 3 and bool(plan.left_out) == (name in ("Gemma2", "Gemma3", "GPT-2"))
    wanted = hooked(model, plan.steering, 0.5)
    write_lora(plan, model, tmp_path / "adapter", 0.5)
    assert difference(wanted, base) > 0.1
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert difference(adapted(IDS).logits, wanted) < ROUNDING
    with adapted.disable_adapter():
        assert torch.equal(adapted(IDS).logits, base)


@torch.no_grad()
def test_strengths_are_adapters_that_are_switched_and_mixed_in_a_batch(tmp_path: Path) -> None:
    model = tiny("Qwen3")
    plan = lora_plan(moved(model, "scale"), model)
    names = {0.25: "weak", 0.5: "middle", 1.0: "strong"}
    for scale, name in names.items():
        write_lora(plan, model, tmp_path / name, scale)
    wanted = {scale: hooked(model, plan.steering, scale) for scale in names}
    base = model(IDS).logits
    adapted = PeftModel.from_pretrained(model, tmp_path / "weak", adapter_name="weak")
    for name in ("middle", "strong"):
        adapted.load_adapter(tmp_path / name, adapter_name=name)
    for scale, name in names.items():
        adapted.set_adapter(name)
        assert difference(adapted(IDS).logits, wanted[scale]) < ROUNDING
    mixed = adapted(IDS.repeat(4, 1), adapter_names=["strong", "__base__", "weak", "middle"]).logits
    for row, logits in zip(mixed, (wanted[1.0], base, wanted[0.25], wanted[0.5]), strict=True):
        assert difference(row, logits[0]) < ROUNDING
    assert difference(wanted[0.5], wanted[0.25]) > 0.1


@torch.no_grad()
def test_a_head_that_is_tied_to_the_embedding_is_changed_alone(tmp_path: Path) -> None:
    model = tiny("Llama", tie_word_embeddings=True)
    steering = moved(model, "scale")
    plan = lora_plan(steering, model, tied_head=True)
    assert plan.tied and "lm_head" in plan.layers and not plan.left_out
    wanted, embedded = hooked(model, steering, 0.5), model.get_input_embeddings()(IDS)
    write_lora(plan, model, tmp_path / "adapter", 0.5)
    assert "do not merge it" in (tmp_path / "adapter/README.md").read_text()
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert difference(adapted(IDS).logits, wanted) < ROUNDING
    assert torch.equal(adapted.get_input_embeddings()(IDS), embedded)


@torch.no_grad()
def test_another_scale_is_another_alpha_and_a_merged_lora_is_the_same_model(tmp_path: Path) -> None:
    model = tiny("Llama")
    plan = lora_plan(moved(model, "scale", slopes=3), model)
    write_lora(plan, model, tmp_path / "a", 0.5)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 1.5)
    ends = ["down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == [end for end in ends if end not in ("o_proj", "down_proj")]
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3}))
    wanted = hooked(model, plan.steering, 1.0)
    merged = PeftModel.from_pretrained(model, tmp_path / "a").merge_and_unload()
    assert difference(merged(IDS).logits, wanted) < ROUNDING


@pytest.mark.parametrize(("name", "operator"), [("Llama", "scale"), ("Gemma2", "scale"), ("GPT-2", "affine")])
@torch.no_grad()
def test_slopes_are_ln_tuning_at_every_norm_and_offsets_where_norms_have_a_bias(
    name: str, operator: str, tmp_path: Path
) -> None:
    model = tiny(name)
    steering = moved(model, operator)
    wanted, base = hooked(model, steering, 0.5), model(IDS).logits
    _, left_out = write_ln_tuning(steering, model, tmp_path / "adapter", 0.5)
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert not left_out and difference(wanted, base) > 0.1
    assert difference(adapted(IDS).logits, wanted) < ROUNDING


@torch.no_grad()
def test_an_offset_without_a_bias_is_lost_in_ln_tuning_only_if_that_is_allowed(tmp_path: Path) -> None:
    model = tiny("Llama")
    steering = moved(model, "affine")
    with pytest.raises(UserError, match="5 of 5 sites do not fit into LN tuning: .*no bias for its offset.*--allow-p"):
        write_ln_tuning(steering, model, tmp_path / "adapter", 0.5)
    part, left_out = write_ln_tuning(steering, model, tmp_path / "adapter", 0.5, allow_partial=True)
    wanted = hooked(model, part, 0.5)
    assert len(left_out) == 5 and difference(wanted, hooked(model, steering, 0.5)) > 0.1
    assert "the norm has no bias for its offset" in (tmp_path / "adapter/README.md").read_text()
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert difference(adapted(IDS).logits, wanted) < ROUNDING
    with pytest.raises(UserError, match="5 of 5 sites do not fit"):
        write_ln_tuning(moved(tiny("OLMo"), "scale"), tiny("OLMo"), tmp_path / "none", 0.5)  # norms without a weight


def test_a_scale_or_a_folder_that_cannot_be_is_refused_and_nothing_is_left_of_an_interrupted_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("Llama")
    steering = steering_of(model, [r"model\.norm"], a=torch.ones(16))
    plan = lora_plan(steering, model)
    with pytest.raises(UserError, match="scale 0 is the base model"):
        write_lora(plan, model, tmp_path / "a", 0.0)
    with pytest.raises(UserError, match="scale is 1.5, expected a number from 0 to 1"):
        write_ln_tuning(steering, model, tmp_path / "a", 1.5)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/mine").write_text("x")
    with pytest.raises(UserError, match="is there already"):
        write_lora(plan, model, tmp_path / "there", 1.0)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dso.exports.peft.write_text", interrupted)  # after the tensors
    with pytest.raises(KeyboardInterrupt):
        write_lora(plan, model, tmp_path / "a", 1.0)
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "mine"]
