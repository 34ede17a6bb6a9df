"""Training of the embedded vision-language model: its steps, that they go on where they were cut off, and its parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dso.decisions.images import open_image
from dso.decisions.sets.drawing import Person, Scene
from dso.models.backbone import Backbone
from tools.embedded_vlm.__main__ import build_parser, main
from tools.embedded_vlm.batches import IGNORED, PREFIX, Corpus, answer_logits, lay_out
from tools.embedded_vlm.corpus import SIDES, words
from tools.embedded_vlm.model import build_model, build_processor, save
from tools.embedded_vlm.sight import VALUES, Reader, labels, patches
from tools.embedded_vlm.training import Recipe, Training, schedule

TINY = {"scenes": 40, "sight_steps": 3, "sight_batch": 4, "steps": 7, "batch": 4, "warmup": 2, "save_every": 2}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def processor():
    return build_processor(words(300))


@pytest.fixture(scope="module")
def corpus(processor) -> Corpus:
    return Corpus(40, 0, processor.tokenizer)


def ids(processor, text: str) -> tuple[int, ...]:
    return tuple(processor.tokenizer(text, add_special_tokens=False).input_ids)


# Batches


def test_two_questions_are_laid_out_behind_one_prefix() -> None:
    tokens, targets, positions, mask = lay_out([[((10, 11), (12,)), ((20,), (21, 22))], [((30,), (31,))]])
    assert tokens.tolist() == [[10, 11, 20, 21], [30, 0, 0, 0]]
    assert targets.tolist() == [[IGNORED, 12, 21, 22], [31, IGNORED, IGNORED, IGNORED]]
    assert positions[0, PREFIX:].tolist() == [PREFIX, PREFIX + 1, PREFIX, PREFIX + 1]
    behind = mask[0, 0, PREFIX:].int()
    assert behind[:, :PREFIX].all()
    assert behind[:, PREFIX:].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert mask[0, 0, :PREFIX, :PREFIX].equal(torch.ones(PREFIX, PREFIX, dtype=torch.bool).tril())


def test_a_branch_is_computed_as_if_it_stood_alone(processor, corpus: Corpus) -> None:
    model = build_model(len(processor.tokenizer), 0).eval()
    rng = np.random.default_rng(0)
    branches = [corpus.branches(rng, row, False, 3, 2, caption) for row, caption in ((0, True), (1, False))]
    pictures = corpus.pixels(np.array([0, 1]), np.array([False, False]))
    with torch.no_grad():
        together, _ = answer_logits(model, patches(model, pictures), branches)
        alone = []
        for picture, row in zip(pictures, branches, strict=True):
            for question, answer in row:
                prompt = torch.tensor([[1, *[4] * (PREFIX - 1), *question, *answer[:-1]]])
                logits = model(input_ids=prompt, pixel_values=picture[None]).logits
                alone.append(logits[0, -len(answer) :])
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_mirrored_scenes_have_left_and_right_exchanged(processor, corpus: Corpus) -> None:
    left, right = (ids(processor, side)[0] for side in SIDES)
    plain, turned = (corpus.branches(np.random.default_rng(1), 0, m, 9, 9, False) for m in (False, True))
    swap = {left: right, right: left}
    assert turned == [tuple(tuple(swap.get(i, i) for i in part) for part in pair) for pair in plain]
    pictures = corpus.pixels(np.array([0, 0]), np.array([False, True]))
    assert pictures[1].equal(pictures[0].flip(2))


def test_pixels_are_those_of_the_models_own_processor(processor, corpus: Corpus, tmp_path: Path) -> None:
    from dso.decisions.sets.scenes import write_picture
    from tools.embedded_vlm.corpus import example

    path = write_picture(example(5).scene, tmp_path)
    made = processor.image_processor(open_image(path), return_tensors="pt")["pixel_values"]
    assert torch.allclose(made[0], corpus.pixels(np.array([5]), np.array([False]))[0], atol=1e-6)


def test_words_are_whole_and_question_marks_are_dropped(processor) -> None:
    assert processor.tokenizer.decode(ids(processor, "Who is the nurse?")) == "who is the nurse"
    assert processor.tokenizer.unk_token_id not in ids(processor, "who works in the kitchen? left right . woman")


# Seeing


def test_attributes_are_numbered_by_side() -> None:
    someone = Person(gender="male", skin=4, hair="red", clothes="blue", tool="fork")
    (row,) = labels([Scene(left=None, right=someone)])
    assert row[0].tolist() == [0] * len(VALUES)
    assert row[1].tolist() == [2, 2, 4, 1, 8, 0]  # male, darker, red, blue, fork, nowhere


def test_each_half_is_read_from_its_own_patches() -> None:
    torch.manual_seed(0)
    reader = Reader(5, 4)
    seen = torch.randn(1, 16, 5)
    told = torch.zeros(1, 2, len(VALUES), dtype=torch.long)
    halves = [seen[0].view(4, 4, 5)[:, part].reshape(-1, 5).mean(0) for part in (slice(0, 2), slice(2, 4))]
    expected = torch.stack([-head(half).log_softmax(-1)[0] for head in reader.heads for half in halves]).mean()
    assert torch.allclose(reader(seen, told)[0], expected)


# Training


def weights(training: Training) -> dict[str, torch.Tensor]:
    return training.model.state_dict()


def test_steps_are_deterministic_and_go_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    whole = Training(Recipe(**TINY), tmp_path / "whole")
    whole.run(said.append)
    assert said[-1].startswith("step 10: loss ")
    cut = Training(Recipe(**TINY), tmp_path / "cut")
    answer = Training._answer

    def cut_off(self, *arguments):
        if self.done == 7:
            raise KeyboardInterrupt
        return answer(self, *arguments)

    monkeypatch.setattr(Training, "_answer", cut_off)
    with pytest.raises(KeyboardInterrupt):
        cut.run(said.append)
    monkeypatch.undo()
    again = Training(Recipe(**TINY), tmp_path / "cut")
    assert again.done == 6
    again.run(said.append)
    assert all(value.equal(weights(whole)[name]) for name, value in weights(again).items())
    other = Training(Recipe(**TINY | {"seed": 1}), tmp_path / "cut")
    assert other.done == 0  # another recipe does not go on from there


def test_each_part_trains_its_own_parameters(tmp_path: Path) -> None:
    training = Training(Recipe(**TINY | {"steps": 0}), tmp_path)
    before = {name: value.clone() for name, value in weights(training).items()}
    training.run(lambda line: None)
    changed = {name for name, value in weights(training).items() if not value.equal(before[name])}
    assert changed and all("vision_tower" in name for name in changed)
    between = {name: value.clone() for name, value in weights(training).items()}
    training.recipe = Recipe(**TINY)
    training.run(lambda line: None)
    changed = {name for name, value in weights(training).items() if not value.equal(between[name])}
    assert changed and not any("vision_tower" in name for name in changed)


def test_the_learning_rate_rises_and_falls() -> None:
    assert [schedule(step, 12, 2) for step in (0, 1, 2)] == pytest.approx([0.5, 1.0, 1.0])
    assert schedule(7, 12, 2) == pytest.approx(0.02 + 0.49)
    assert schedule(12, 12, 2) == pytest.approx(0.02)


def test_the_command_writes_a_model_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        assert main([*options, f"--out={tmp_path / 'model'}", f"--work={tmp_path / 'work'}"]) == 0
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    assert f"written to {tmp_path / 'model'}" in capsys.readouterr().out
    backbone = Backbone.load(str(tmp_path / "model"))
    assert backbone.vision is not None
    assert backbone.generate([{"role": "user", "content": "Describe the picture."}], max_new_tokens=1) is not None


def test_the_shipped_recipe_is_the_default() -> None:
    known = vars(build_parser().parse_args([]))
    assert Recipe(**{name: known[name] for name in Recipe.__dataclass_fields__}) == Recipe()
    assert known["out"].name == "vlm_scenes" and known["threads"] == 1


def test_weights_are_readable_by_all(processor, tmp_path: Path) -> None:
    save(build_model(len(processor.tokenizer), 0), processor, tmp_path / "model")
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "model").iterdir())
