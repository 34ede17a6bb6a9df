"""Merging: weights derived by hand, every architecture against its hooks, what is refused, and what is left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from architectures import tiny
from cases import CASES
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from vision_models import make_processor

import dso.exports.merge
from dso.errors import UserError
from dso.exports.folder import write_config
from dso.exports.maps import affine_map
from dso.exports.merge import Merging
from dso.exports.norms import NormForm
from dso.exports.plan import Change, MergeError, plan_merge
from dso.exports.probe import read_probe
from dso.exports.running import computing_in, logits
from dso.exports.shards import Entry, Shards, write_tensors
from dso.exports.slots import bias_switches
from dso.steering.model import Steering
from dso.steering.operators import make_operator

IDS = torch.tensor([[40, 41, 42, 43], [50, 60, 70, 80]])
TOLERANCE = 5e-5


def operator(kind: str, rank: int | None = None, **values: list):
    made = make_operator(kind, len(next(iter(values.values()))), rank)
    with torch.no_grad():
        for name, value in values.items():
            getattr(made, name).copy_(torch.tensor(value))
    return made


def random_steering(model, kind: str = "scale", sites=None, size: float = 0.2, **facts) -> Steering:
    rank = 2 if kind == "low_rank" else None
    steering = Steering.for_model(model, operator=kind, rank=rank, sites=sites, scale_range=(0.0, 2.0), **facts)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in steering.tensors().values():
            value.copy_(size * torch.randn(value.shape, generator=generator))
    return steering


def roughened(model):
    """The model with norms and biases that are not all alike, as trained ones are."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return model


def saved(model, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


def plain_logits(folder: Path, ids=IDS, kind=AutoModelForCausalLM) -> torch.Tensor:
    return logits(kind.from_pretrained(folder).eval(), ids)


# The algebra, on numbers that were worked out by hand: a = [0.5, -0.5], b = [1, 2], s = 0.5.

AFFINE = {"a": [0.5, -0.5], "b": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("form", "weight", "bias", "new_weight", "new_bias"),
    [
        (NormForm(True, 0.0, False), [2.0, 4.0], None, [2.5, 3.0], None),  # w (1 + s a)
        (NormForm(True, 1.0, False), [0.0, 1.0], None, [0.25, 0.5], None),  # (1 + w)(1 + s a) - 1
        (NormForm(True, 0.0, True), [2.0, 4.0], [4.0, 8.0], [2.5, 3.0], [5.0, 6.0]),  # bias (1 + s a)
        (NormForm(False, 1.0, True), None, [4.0, 8.0], None, [5.0, 6.0]),
    ],
)
def test_what_slopes_make_of_a_norm(form, weight, bias, new_weight, new_bias) -> None:
    own = affine_map(operator("scale", a=AFFINE["a"]), 0.5)
    given = [None if value is None else torch.tensor(value) for value in (weight, bias)]
    found = Change(form=form, own=own).apply(*given)
    assert [None if value is None else value.tolist() for value in found] == [new_weight, new_bias]


def test_what_an_offset_makes_of_a_layer_norm_and_of_a_reader() -> None:
    own = affine_map(operator("affine", **AFFINE), 0.5)
    layer = Change(form=NormForm(True, 0.0, True), own=own).apply(torch.tensor([2.0, 4.0]), torch.tensor([4.0, 8.0]))
    assert layer[1].tolist() == [5.5, 7.0]  # 4 * 1.25 + 0.5, 8 * 0.75 + 1
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    offset = affine_map(operator("bias", b=[1.0, 2.0]), 0.5)  # c = [0.5, 1]
    for transposed in (False, True):
        change = Change(read=offset, transposed=transposed)
        found = change.apply(weight.T if transposed else weight, None)
        assert torch.equal(found[0], weight.T if transposed else weight)
        assert found[1].tolist() == [2.5, 5.5, 8.5]  # W c
        assert change.apply(weight.T if transposed else weight, torch.ones(3))[1].tolist() == [3.5, 6.5, 9.5]
        assert not change.moves_weight and change.makes_bias


def test_what_an_operator_makes_of_the_linear_layer_before_it() -> None:
    weight, bias = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([4.0, 8.0])
    affine = Change(own=affine_map(operator("affine", **AFFINE), 0.5)).apply(weight, bias)
    assert affine[0].tolist() == [[1.25, 2.5], [2.25, 3.0]] and affine[1].tolist() == [5.5, 7.0]
    low = operator("low_rank", 1, u=[[1.0], [2.0]], v=[[1.0], [1.0]])
    found = Change(own=affine_map(low, 0.5)).apply(weight, bias)
    # V^T W = [4, 6], so W + s U [4, 6] = [[1 + 2, 2 + 3], [3 + 4, 4 + 6]]; V^T bias = 12, so [4 + 6, 8 + 12]
    assert found[0].tolist() == [[3.0, 5.0], [7.0, 10.0]] and found[1].tolist() == [10.0, 20.0]


def test_a_reader_that_is_a_site_itself_takes_over_both_in_their_order() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    read = affine_map(operator("bias", b=[1.0, 2.0]), 0.5)  # adds W [0.5, 1] = [2.5, 5.5]
    own = affine_map(operator("affine", **AFFINE), 0.5)  # times [1.25, 0.75], plus [0.5, 1]
    found = Change(read=read, own=own).apply(weight, None)
    assert found[0].tolist() == [[1.25, 2.5], [2.25, 3.0]] and found[1].tolist() == [3.625, 5.125]


def test_dividing_by_the_same_factors_gives_the_old_values_back() -> None:
    steering, model = random_steering(tiny_llama()), roughened(tiny_llama())
    for site, change in plan_merge(steering, model, 0.5).changes.items():
        old = model.get_submodule(site).weight
        back = change.apply(old, None)[0] / change.own.diagonal
        torch.testing.assert_close(back, old, rtol=2**-22, atol=0)  # two roundings


# Every architecture: the folder, loaded by transformers alone, gives what the hooks give.


@pytest.mark.parametrize("name", CASES)
def test_slopes_merge_into_every_architecture(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = roughened(case.backbone(layout="padded").model)
    saved(model, tmp_path / "base")
    if case.vision:
        make_processor(name).save_pretrained(tmp_path / "base")
    steering = random_steering(model, base_model=str(tmp_path / "base"))
    report = Merging.of(steering, 0.5).write(tmp_path / "out")
    assert not report.left_out and not report.lost and report.bfloat16.passed
    kind = AutoModelForImageTextToText if case.vision else AutoModelForCausalLM
    with steering.on(model, 0.5):
        hooked = logits(model, IDS)
    torch.testing.assert_close(plain_logits(tmp_path / "out", kind=kind), hooked, atol=TOLERANCE, rtol=TOLERANCE)
    assert (hooked - plain_logits(tmp_path / "base", kind=kind)).abs().max() > 0.5
    assert report.saved.largest < TOLERANCE and report.float32.largest < TOLERANCE


ALL, QKV, NONE = "every offset", "behind q, k, v", "none"


@pytest.mark.parametrize(
    ("name", "switches", "left"),
    [
        ("Llama", ("attention_bias", "mlp_bias"), {"model.norm"}),
        ("Qwen2", (), {"post_attention_layernorm", "model.norm"}),
        ("Qwen3", ("attention_bias",), {"post_attention_layernorm", "model.norm"}),
        ("Gemma3", ("attention_bias",), {"post_attention_layernorm", "feedforward_layernorm", "model.norm"}),
        ("Phi3", (), {"input_layernorm", "post_attention_layernorm", "model.norm"}),
        ("GPT-2", (), set()),
        ("Falcon-40B", (), set()),
    ],
)
def test_offsets_merge_where_there_is_a_place(name: str, switches, left: set[str], tmp_path: Path) -> None:
    model = roughened(tiny(name))
    steering = random_steering(model, "affine", base_model=str(saved(model, tmp_path / "base")))
    merging = Merging.of(steering, 0.5)
    assert tuple(merging.plan.switches) == switches
    wanted = {site for site in steering.config.sites if any(site.endswith(end) for end in left)}
    assert {entry.site for entry in merging.plan.left_out} == wanted
    assert {entry.part for entry in merging.plan.left_out} <= {"offset"}
    merging.write(tmp_path / "out", allow_partial=True)
    with merging.part.on(model, 0.5):
        hooked = logits(model, IDS)
    torch.testing.assert_close(plain_logits(tmp_path / "out"), hooked, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", ["affine", "low_rank"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT-2", "GPT-NeoX"])
def test_operators_behind_attention_merge(name: str, kind: str, tmp_path: Path) -> None:
    model = roughened(tiny(name))
    steering = random_steering(model, kind, ["attention"], base_model=str(saved(model, tmp_path / "base")))
    report = Merging.of(steering, 0.5).write(tmp_path / "out")
    with steering.on(model, 0.5):
        hooked = logits(model, IDS)
    torch.testing.assert_close(plain_logits(tmp_path / "out"), hooked, atol=TOLERANCE, rtol=TOLERANCE)
    assert report.effect.largest > 0.1


def test_low_rank_at_a_norm_goes_into_its_readers_and_a_norm_without_weight_too(tmp_path: Path) -> None:
    for name, kind in (("Llama", "low_rank"), ("OLMo", "scale")):
        model = roughened(tiny(name, tie_word_embeddings=False))
        steering = random_steering(model, kind, base_model=str(saved(model, tmp_path / name)))
        if kind == "low_rank":
            with torch.no_grad():
                steering.operators["model.norm"].b.zero_()  # the head has no bias
        Merging.of(steering, 0.5).write(tmp_path / "out")
        with steering.on(model, 0.5):
            hooked = logits(model, IDS)
        torch.testing.assert_close(plain_logits(tmp_path / "out"), hooked, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_low_rank_operator_goes_in_without_an_offset_that_has_no_place(tmp_path: Path) -> None:
    model = roughened(tiny("Phi3", tie_word_embeddings=False))
    steering = random_steering(model, "low_rank", base_model=str(saved(model, tmp_path / "base")))
    merging = Merging.of(steering, 0.5)
    assert {entry.part for entry in merging.plan.left_out} == {"offset"} and len(merging.plan.left_out) == 5
    assert "qkv_proj has no bias, and the architecture no switch" in merging.plan.left_out[0].reason
    merging.write(tmp_path / "out", allow_partial=True)
    with merging.part.on(model, 0.5):
        hooked = logits(model, IDS)
    torch.testing.assert_close(plain_logits(tmp_path / "out"), hooked, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_vision_models_text_config_gets_the_switch(tmp_path: Path) -> None:
    model = roughened(CASES["LLaVA"].backbone(layout="padded").model)
    saved(model, tmp_path / "base")
    make_processor("LLaVA").save_pretrained(tmp_path / "base")
    steering = random_steering(model, "affine", base_model=str(tmp_path / "base"))
    merging = Merging.of(steering, 0.5)
    merging.write(tmp_path / "out", allow_partial=True)
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert record["text_config"]["mlp_bias"] and "mlp_bias" not in record
    with merging.part.on(model, 0.5):
        hooked = logits(model, IDS)
    found = plain_logits(tmp_path / "out", kind=AutoModelForImageTextToText)
    torch.testing.assert_close(found, hooked, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_weight_that_is_used_twice_is_not_changed(tmp_path: Path) -> None:
    model = tiny("OLMo", tie_word_embeddings=True)
    plan = plan_merge(random_steering(model), model, 0.5)
    assert [(entry.site, entry.part) for entry in plan.left_out] == [("model.norm", "operator")]
    assert "lm_head" in plan.left_out[0].reason and "embed_tokens" in plan.left_out[0].reason


def test_biases_are_found_by_building_the_architecture() -> None:
    found = bias_switches(tiny("Llama"))
    assert set(found) == {"attention_bias", "mlp_bias"}
    assert found["mlp_bias"] == tuple(f"model.layers.{n}.mlp.{p}_proj" for n in (0, 1) for p in ("gate", "up", "down"))
    assert bias_switches(tiny("Mistral")) == {}


# The folder.


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(roughened(tiny_llama()), tmp_path / "base")


def made_for(base: Path, kind: str = "scale", **options) -> Steering:
    model = AutoModelForCausalLM.from_pretrained(base)
    return random_steering(model, kind, base_model=str(base), **options)


def test_what_is_in_the_folder(base: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text("the base's card", encoding="utf-8")
    (base / "LICENSE").write_text("its licence", encoding="utf-8")
    (base / "pytorch_model.bin").write_bytes(b"old")
    Merging.of(made_for(base), 0.5).write(tmp_path / "out", stated="runs/x/steering")
    present = {path.name for path in (tmp_path / "out").iterdir()}
    wanted = {path.name for path in base.iterdir()} - {"pytorch_model.bin"} | {"README.base.md", "dso_probe.json"}
    assert present == wanted
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "runs/x/steering at scale 0.5" in text and "5 of 5 sites" in text
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == byte_tokenizer()("ab").input_ids


def test_the_two_lines_of_the_readme_run_and_give_what_they_say(base: Path, tmp_path: Path) -> None:
    Merging.of(made_for(base), 0.5).write(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0].replace("FOLDER", repr(str(tmp_path / "out")))
    shown: list = []
    exec(code, {"transformers": __import__("transformers"), "torch": torch, "print": shown.append})
    wanted = json.loads("[" + text.split("gives [")[1].split("]")[0] + "]")
    torch.testing.assert_close(shown[0], torch.tensor(wanted), atol=1e-3, rtol=0)


def test_shards_are_written_one_by_one_and_untouched_ones_are_copied(tmp_path: Path) -> None:
    model = roughened(tiny_llama())
    base = saved(model, tmp_path / "base", max_shard_size="6KB")
    steering = random_steering(model, sites=[r"model\.norm"], base_model=str(base))
    Merging.of(steering, 0.5).write(tmp_path / "out")
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({*index.values()}) > 3
    for file in {*index.values()}:
        same = (base / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
        assert same == (file != index["model.norm.weight"])
    with steering.on(model, 0.5):
        torch.testing.assert_close(plain_logits(tmp_path / "out"), logits(model, IDS), atol=TOLERANCE, rtol=TOLERANCE)


def test_new_biases_stand_in_the_index(tmp_path: Path) -> None:
    base = saved(roughened(tiny_llama()), tmp_path / "base", max_shard_size="6KB")
    Merging.of(made_for(base, "affine"), 0.5).write(tmp_path / "out", allow_partial=True)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert (
        index["weight_map"]["model.layers.0.mlp.up_proj.bias"]
        == index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    )
    sizes = sum(load_file(p)[k].nbytes for p in (tmp_path / "out").glob("*.safetensors") for k in load_file(p))
    assert index["metadata"]["total_size"] == sizes
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.attention_bias and config.mlp_bias
    down = next(
        p for p in (tmp_path / "out").glob("*.safetensors") if "model.layers.0.mlp.down_proj.bias" in load_file(p)
    )
    assert not load_file(down)["model.layers.0.mlp.down_proj.bias"].any()  # comes with the switch, has nothing to do


def test_a_tensor_is_gone_before_the_next_one_is_asked_for(tmp_path: Path) -> None:
    import weakref

    alive: list[weakref.ref] = []

    def make() -> torch.Tensor:
        assert not any(ref() is not None for ref in alive)
        value = torch.arange(6.0).reshape(2, 3)
        alive.append(weakref.ref(value))
        return value

    entries = [Entry(key, "F32", (2, 3), make) for key in "cab"] + [Entry("n", "I64", (1,), lambda: torch.tensor([7]))]
    write_tensors(tmp_path / "x.safetensors", entries)
    found = load_file(tmp_path / "x.safetensors")
    assert len(alive) == 3 and found["n"].item() == 7
    assert all(torch.equal(found[key], torch.arange(6.0).reshape(2, 3)) for key in "abc")
    save_file(dict(found), tmp_path / "y.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_files_with_an_older_prefix_are_found_by_their_values(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    old = {key.removeprefix("model."): value for key, value in load_file(base / "model.safetensors").items()}
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    steering = random_steering(model, base_model=str(base))
    Merging.of(steering, 0.5).write(tmp_path / "out")
    assert {*load_file(tmp_path / "out" / "model.safetensors")} == {*old}
    with steering.on(model, 0.5):
        torch.testing.assert_close(plain_logits(tmp_path / "out"), logits(model, IDS), atol=TOLERANCE, rtol=TOLERANCE)
    shards = Shards(base)
    with pytest.raises(UserError, match="is not in its files under a name that is known"):
        shards.key_of("model.norm.weight", torch.zeros(16))


def test_the_config_is_edited_and_not_written_anew(base: Path, tmp_path: Path) -> None:
    record = json.loads((base / "config.json").read_text())
    record["torch_dtype"] = record.pop("dtype")
    record["an_older_key"] = {"kept": True}
    (base / "config.json").write_text(json.dumps(record), encoding="utf-8")
    write_config(base, tmp_path, AutoConfig.from_pretrained(base), ("mlp_bias",), "bfloat16")
    found = json.loads((tmp_path / "config.json").read_text())
    assert found == record | {"mlp_bias": True, "torch_dtype": "bfloat16"}


# Rounding.


def test_float32_arithmetic_of_a_narrow_model_is_that_of_a_wide_one() -> None:
    for name in ("Llama", "Mixtral", "Gemma2", "GPT-2", "Falcon-ALiBi"):
        narrow = tiny(name).to(torch.bfloat16)
        wanted = logits(tiny(name).to(torch.bfloat16).float(), IDS)
        with computing_in(narrow, torch.float32):
            assert torch.equal(logits(narrow, IDS), wanted)
        assert {value.dtype for value in narrow.parameters()} == {torch.bfloat16}


def test_changes_that_vanish_in_bfloat16_are_refused_with_their_share(tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)  # norm weights are 1, where bfloat16 goes up by 1/128 and down by 1/256
    base = saved(model, tmp_path / "base")
    steering = Steering.for_model(model, operator="scale", base_model=str(base))
    with torch.no_grad():
        for value in steering.tensors().values():
            value[:8] = 0.002  # less than half a step
            value[8:12] = 0.02
    merging = Merging.of(steering)
    with pytest.raises(MergeError, match=r"67% of the 60 values .* 0.0078. --dtype float32 .* --allow-rounding"):
        merging.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    rounded = merging.write(tmp_path / "out", allow_rounding=True)
    assert rounded.dtype == "bfloat16" and rounded.lost == pytest.approx(2 / 3)
    assert rounded.float32.largest < 1e-5 < rounded.saved.largest
    wide = merging.write(tmp_path / "out", "float32")
    assert wide.dtype == "float32" and not wide.lost and wide.saved.largest < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


# What is refused, and what is left behind.


def test_offsets_without_a_place_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MergeError, match=r"1 of 5 sites cannot .* model.norm: its offset .* lm_head .* --allow-partial"
    ):
        Merging.of(made_for(base, "affine")).write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base: Merging.of(made_for(base), 0.0), "scale 0 is the base model"),
        (lambda base: Merging.of(made_for(base), 2.5), "from 0 to 2"),
        (lambda base: Merging.of(random_steering(tiny_llama())), "names no base model"),
        (lambda base: Merging.of(random_steering(tiny_llama(seed=1)), model=str(base)), "not the ones trained on"),
        (lambda base: Merging.of(made_for(base)).write(base), "is the base model's own folder"),
        (lambda base: Merging.of(made_for(base)).write(base / "config.json"), "is no folder"),
        (lambda base: Merging.of(made_for(base)).write(base.parent / "out", "int8"), "expected one of float32"),
    ],
)
def test_what_cannot_be_merged_is_one_line(base: Path, change, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        change(base)
    assert "\n" not in str(error.value)


def test_a_model_without_safetensors_is_refused(base: Path) -> None:
    steering = made_for(base)
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match="only safetensors can be merged into"):
        Merging.of(steering)


def test_the_same_command_again_replaces_its_folder_and_other_files_stop_it(base: Path, tmp_path: Path) -> None:
    steering = made_for(base)
    Merging.of(steering, 0.5).write(tmp_path / "out")
    first = plain_logits(tmp_path / "out")
    Merging.of(steering, 1.0).write(tmp_path / "out")
    assert not torch.equal(plain_logits(tmp_path / "out"), first)
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(MergeError, match=r"other files in it \(notes.txt\); nothing was written"):
        Merging.of(steering, 0.5).write(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    os.mkdir(tmp_path / "empty")
    Merging.of(steering, 0.5).write(tmp_path / "empty")
    assert torch.equal(plain_logits(tmp_path / "empty"), first)


def test_an_interrupted_write_leaves_nothing_and_a_killed_ones_rest_is_cleared(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merging = Merging.of(made_for(base), 0.5)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dso.exports.merge, "copy_rest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merging.write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    (tmp_path / ".out.0badcafe.part").mkdir()
    merging.write(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_a_folder_that_does_not_load_as_meant_is_not_kept(base: Path, tmp_path: Path, monkeypatch) -> None:
    merging = Merging.of(made_for(base), 0.5)

    def unchanged(shards: Shards, fresh: Path, *_: object) -> None:
        shutil.copyfile(base / "model.safetensors", fresh / "model.safetensors")

    monkeypatch.setattr(dso.exports.merge, "write_weights", unchanged)
    with pytest.raises(MergeError, match="what was written is not what was meant"):
        merging.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_model_is_not_merged_into_again(base: Path, tmp_path: Path) -> None:
    steering = made_for(base)
    Merging.of(steering, 0.5).write(tmp_path / "out")
    with pytest.raises(UserError, match="not the ones trained on"):
        Merging.of(steering, 0.5, model=str(tmp_path / "out"))
    assert read_probe(tmp_path / "out").made["scale"] == 0.5
