"""Edits by hand-derived numbers; a patch is put on and taken off to the bit, and its files are refused or right."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from accidents import edited, sign
from steered import logits, moved
from tiny import byte_tokenizer, small_set, tiny_llama

from dso.editing import storing
from dso.editing.edit import at_scale, edited_values, scale_range
from dso.editing.localise import EditingError, editable
from dso.editing.make import make_patch
from dso.editing.patch import Patch
from dso.evaluation.evaluator import Evaluator
from dso.models.backbone import Backbone
from dso.steering.config import SteeringError
from dso.steering.handle import attached, detach_all, unsteered

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
CONFIG, TENSORS, CARD = storing.FILES


def model(up=(1.0, 2.0), down=0.5):
    """Everything 4 but for two places of one weight and one of another."""
    made = tiny_llama()
    with torch.no_grad():
        for weight in editable(made).values():
            weight.fill_(4.0)
        made.get_parameter(UP).view(-1)[[2, 5]] = torch.tensor(up)
        made.get_parameter(DOWN).view(-1)[0] = down
    return made


def state(made):
    return {name: value.clone() for name, value in made.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def at(made, name, *places):
    return made.get_parameter(name).view(-1)[list(places)].tolist()


@pytest.fixture
def patch():
    return make_patch(tiny_llama(0), tiny_llama(1), k=200, base_model="tiny", reference_model="other")


@pytest.fixture
def folder(patch, tmp_path):
    patch.save_pretrained(tmp_path / "patch", "# card\n")
    return tmp_path / "patch"


# ---------------------------------------------------------------- edits


@pytest.mark.parametrize(
    ("alpha", "up", "down"),
    [(0.0, [1.0, 2.0], [0.5]), (0.5, [2.0, 2.0], [0.25]), (1.0, [3.0, 2.0], [0.0]), (-1.0, [-1.0, 2.0], [1.0]),
     (2.0, [5.0, 2.0], [-0.5])],
)  # fmt: skip
def test_alpha_moves_weights_from_the_target_to_the_reference_and_beyond(alpha, up, down):
    target = model()
    found = make_patch(target, model(up=(3.0, 2.0), down=0.0), k=10)
    assert {name: index.tolist() for name, index in found.places.items()} == {UP: [2], DOWN: [0]}
    with found.on(target, alpha):
        assert at(target, UP, 2, 5) == up and at(target, DOWN, 0) == down
        assert at(target, UP, 0) == [4.0]


def test_pruning_sets_weights_to_zero():
    target = model()
    with make_patch(target, model(up=(3.0, 2.0)), edit="prune").on(target, 0.25) as handle:
        assert at(target, UP, 2) == [0.75]
        handle.scale = 1.0
        assert at(target, UP, 2, 5) == [0.0, 2.0]


def test_a_switch_takes_over_the_references_mask():
    target, reference = model(up=(0.1, 3.0)), model(up=(3.5, 0.2))
    # Two weights go: the target's 0.1 and 0.5 (down), the reference's 0.2 and 0.5.
    found = make_patch(target, reference, method="mask", edit="switch", sparsity=2 / 4608)
    assert {name: index.tolist() for name, index in found.places.items()} == {UP: [2, 5]}
    assert found.values[UP].tolist() == [pytest.approx(0.1), 0.0]  # its own where only the reference keeps it
    assert make_patch(target, reference, method="mask", sparsity=2 / 4608).values[UP].tolist() == [
        3.5,
        pytest.approx(0.2),
    ]


def test_both_ends_are_exact_in_every_dtype():
    drawn = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        start, end = torch.randn(2, 500, generator=drawn).to(dtype)
        assert torch.equal(at_scale(start, end.float(), 0.0), start)
        assert torch.equal(at_scale(start, end.float(), 1.0), end)
        assert at_scale(start, end.float(), 0.3).dtype == dtype


def test_edits_say_what_they_lack():
    target, reference = tiny_llama(0), tiny_llama(1)
    for arguments, reason in (
        ({"edit": "swap"}, "unknown edit 'swap'; known are interpolate"),
        ({"method": "gradient"}, "unknown method 'gradient'; known are value, mask"),
        ({"edit": "switch"}, "localise with method 'mask'"),
        ({"method": "mask", "sparsity": 0.0}, "must be above 0"),
    ):
        with pytest.raises(EditingError, match=reason):
            make_patch(target, reference, **arguments)
    with pytest.raises(EditingError, match="there is none"):
        edited_values("switch", target, reference, {UP: torch.tensor([0])})
    assert scale_range("extrapolate") == (-1000.0, 1000.0)
    interpolated = make_patch(target, reference, edit="interpolate")
    with pytest.raises(SteeringError, match="expected a number from 0 to 1"):
        interpolated.attach(target, 1.5)
    assert not attached(target) and same(state(target), tiny_llama(0).state_dict())


# ---------------------------------------------------------------- on a model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_restored_to_the_bit(patch, dtype):
    base = tiny_llama(0).to(dtype)
    before, said = state(base), logits(base)
    handle = patch.attach(base, 0.3)
    for scale in (7.77, -1000.0, 1e-3, 1.0, 0.3):
        handle.scale = scale
        assert not same(before, base.state_dict())
    handle.scale = 0
    assert same(before, base.state_dict())
    handle.scale = 0.6
    handle.detach()
    handle.detach()
    assert same(before, base.state_dict()) and torch.equal(logits(base), said) and not attached(base)


def test_a_block_restores_on_an_error_too(patch):
    base = tiny_llama(0)
    before = state(base)
    with pytest.raises(RuntimeError, match="mine"), patch.on(base, 2.0):
        raise RuntimeError("mine")
    assert same(before, base.state_dict())


def test_at_scale_one_the_places_are_the_references(patch):
    base, reference = tiny_llama(0), tiny_llama(1)
    with patch.on(base):
        for name, index in patch.places.items():
            own, theirs = (m.get_parameter(name).flatten() for m in (base, reference))
            assert torch.equal(own[index], theirs[index])
            assert int((own != tiny_llama(0).get_parameter(name).flatten()).sum()) == len(index)


def test_everybody_who_asks_for_the_base_model_gets_it(patch):
    base = tiny_llama(0)
    before = state(base)
    handle = patch.attach(base, 1.0)
    with unsteered(base):
        assert same(before, base.state_dict())
    assert not same(before, base.state_dict()) and handle.scale == 1.0
    detach_all(base)
    assert same(before, base.state_dict())


def test_an_evaluator_measures_a_patch_against_the_base_model(patch):
    backbone, decisions = Backbone(tiny_llama(0), byte_tokenizer(), "tiny"), small_set(("test",))
    handle = patch.attach(backbone.model, 1.0)
    base, patched = Evaluator(backbone, decisions, handle).curve([0.0, 1.0])
    handle.detach()
    assert base.kl.max() == 0 and patched.kl.min() > 0
    assert (base.policy == Evaluator(backbone, decisions).measure(0.0).policy).all()


def test_a_patch_and_a_steering_go_together(patch):
    base = tiny_llama(0)
    steering, said = moved(base), logits(base)
    with steering.on(base), patch.on(base):
        both = logits(base)
    with patch.on(base), steering.on(base):
        assert torch.equal(logits(base), both)
    assert torch.equal(logits(base), said) and not torch.equal(both, said)


def test_a_cache_is_not_gone_on_with_at_another_scale(patch):
    base, ids = tiny_llama(0), torch.tensor([[5, 9, 33]])
    with patch.on(base, 0.5) as handle:
        cache = base(ids, use_cache=True).past_key_values
        handle.scale = 1.0
        with pytest.raises(SteeringError, match="begun at scale 0.5, and the scale is 1 now"):
            base(ids[:, :1], past_key_values=cache)


def test_what_does_not_fit_is_refused_and_left_as_it_was(patch):
    other = tiny_llama(1)
    before = state(other)
    for wrong, reason in (
        (other, "the weights of module 'model.layers.*are not the ones trained on; the patch was made for tiny"),
        (tiny_llama(width=32), r"has shape \(.*, expected \(.*; the patch was made for tiny"),
        (tiny_llama(layers=1), "the model has no weight 'model.layers.1"),
    ):
        with pytest.raises(SteeringError, match=reason) as raised:
            patch.attach(wrong)
        assert len(str(raised.value).splitlines()) == 1
    assert same(before, other.state_dict())
    third = tiny_llama(2)
    with patch.on(third, check=False):
        assert not same(tiny_llama(2).state_dict(), third.state_dict())
    base = tiny_llama(0)
    with patch.on(base), pytest.raises(SteeringError, match="a patch is on the model already"):
        patch.attach(base)
    with pytest.raises(SteeringError, match="its scale is one number"):
        patch.attach(base, torch.tensor([0.0, 1.0]))
    assert same(state(base), tiny_llama(0).state_dict()) and not attached(base)


# ---------------------------------------------------------------- files


def test_what_is_read_is_what_was_written(patch, folder):
    again = Patch.from_pretrained(folder)
    assert (again.config, again.shapes, again.about, again.card) == (
        patch.config,
        patch.shapes,
        patch.about,
        "# card\n",
    )
    for one, other in ((again.places, patch.places), (again.values, patch.values)):
        assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert again.key == Patch.from_pretrained(folder).key
    assert again.about == {"method": "value", "edit": "extrapolate", "reference": "other", "sparsity": "0"}
    # 200 places of 4 + 4 bytes and a header: a sparse patch is small.
    assert 1600 < (folder / TENSORS).stat().st_size < 1600 + 4096


def test_accidents_are_refused_or_change_nothing(patch, folder):
    drawn, refused = random.Random(5), 0
    whole = {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)}
    for _ in range(60):
        name = drawn.choice([CONFIG, TENSORS])
        (folder / name).write_bytes(edited(whole[name], drawn))
        try:
            again = Patch.from_pretrained(folder)
        except SteeringError as error:
            assert name in str(error) and len(str(error).splitlines()) == 1
            refused += 1
        else:
            assert again.config == patch.config
        (folder / name).write_bytes(whole[name])
    assert refused > 54


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({UP: {"shape": [32, 16], "number": 2**29 + 1}}, "expected 1 to 536870912"),
        ({UP: {"shape": [32, 16], "number": 2**29}}, r"damaged: it has \d+ bytes, expected"),
        ({UP: {"shape": [32, 2**40], "number": 1}}, "which no weight has"),
        ({UP: {"shape": [32, True], "number": 1}}, "which no weight has"),
        ({UP: {"shape": "x", "number": 1}}, "states no shape"),
        ({UP: [1]}, "states no shape"),
        ({}, "asks for 0 places"),
        ([1, 2], "asks for 0 places"),
    ],
)
def test_nothing_is_allocated_that_the_files_do_not_hold(folder, weights, reason):
    names = {name.removesuffix(".weight"): 32 for name in weights} if isinstance(weights, dict) and weights else {UP: 1}
    sign(folder / CONFIG, folder / TENSORS, weights=weights, sites=names, fingerprint={})
    with pytest.raises(SteeringError, match=reason):
        Patch.from_pretrained(folder)


@pytest.mark.parametrize(
    ("indices", "values", "reason"),
    [
        ([5, 5], [1.0, 1.0], "not in ascending order"),
        ([5, 4], [1.0, 1.0], "not in ascending order"),
        ([-1, 4], [1.0, 1.0], "outside of its shape"),
        ([4, 512], [1.0, 1.0], "outside of its shape"),
        ([4, 5], [1.0, float("nan")], "not of finite float32 numbers"),
    ],
)
def test_places_that_no_weight_has_are_refused(folder, indices, values, reason):
    from safetensors.torch import save

    tensors = {f"{UP}.indices": torch.tensor(indices, dtype=torch.int32), f"{UP}.values": torch.tensor(values)}
    (folder / TENSORS).write_bytes(save(tensors))
    name = UP.removesuffix(".weight")
    sign(
        folder / CONFIG,
        folder / TENSORS,
        weights={UP: {"shape": [32, 16], "number": 2}},
        sites={name: 32},
        fingerprint={},
    )
    with pytest.raises(SteeringError, match=reason):
        Patch.from_pretrained(folder)


def test_nothing_is_saved_that_is_not_finite(patch, tmp_path):
    broken = copy.deepcopy(patch)
    next(iter(broken.values.values()))[0] = float("inf")
    with pytest.raises(SteeringError, match="is not finite; nothing was saved"):
        broken.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()
