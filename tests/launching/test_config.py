"""The typed config: every shipped file parses, every mistake is refused with its dotted path and a way out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.config.reading import build, parse_yaml, paths
from launch.config.schema import (
    ConfigError,
    ConstraintsSection,
    DataSection,
    EvaluationSection,
    ModelSection,
    RunSection,
    SteeringSection,
    TrainConfig,
    TrainSection,
    known_configs,
    load_config,
    resolved_yaml,
)

DEFAULT = "smollm2-roles"


def write(folder: Path, text: str) -> str:
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(name, overrides)
    return str(caught.value)


# Finding and reading


@pytest.mark.parametrize("name", known_configs())
def test_every_shipped_config_parses_and_reads_back_equal(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert load_config(write(tmp_path, resolved_yaml(config))) == config


def test_the_default_run_is_shipped() -> None:
    assert DEFAULT in known_configs()


def test_a_path_and_a_name_give_the_same_config() -> None:
    path = Path(__file__).parents[2] / "configs" / f"{DEFAULT}.yaml"
    assert load_config(str(path)) == load_config(DEFAULT)


def test_what_a_file_does_not_say_is_a_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "train: {steps: 7}\n"))
    assert config == TrainConfig(train=TrainSection(steps=7))


def test_the_resolved_config_names_every_value() -> None:
    raw = parse_yaml(resolved_yaml(TrainConfig()))
    assert isinstance(raw, dict)
    known = set(paths(TrainConfig))

    def named(values: dict, path: str = "") -> Iterator[str]:
        for key, value in values.items():
            below = f"{path}{key}."
            yield from named(value, below) if any(name.startswith(below) for name in known) else [below[:-1]]

    assert set(named(raw)) == known


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    assert refusal("smolm2-role").startswith("no config is named 'smolm2-role'; did you mean smollm2-roles?")
    assert DEFAULT in refusal("qqq")


def test_a_missing_file_an_empty_one_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "no/such.yaml: cannot be read: No such file" in refusal("no/such.yaml")
    assert "did you mean smollm2-roles?" in refusal(f"configs/{DEFAULT}s.yaml")
    assert "cannot be read: Is a directory" in refusal(str(tmp_path))
    assert "own.yaml: expected a mapping of sections" in refusal(write(tmp_path, "# nothing\n"))


def test_broken_text_is_refused_with_its_place(tmp_path: Path) -> None:
    assert "own.yaml: line 2, column 1: not valid YAML" in refusal(write(tmp_path, "train: [1,\n"))
    assert "own.yaml: line 3: the key 'steps' was given before, on line 2" in refusal(
        write(tmp_path, "train:\n  steps: 1\n  steps: 2\n")
    )
    assert "not valid YAML" in refusal(write(tmp_path, "a: &a [*a]\n"))
    assert "not valid YAML" in refusal(write(tmp_path, "a: !!python/object:os.system {}\n"))
    (tmp_path / "own.yaml").write_bytes(b"train: \xff\n")
    assert "own.yaml: not valid UTF-8 at byte 7" in refusal(str(tmp_path / "own.yaml"))


# Keys


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, "train: {stpes: 3}")).endswith("train.stpes: unknown key; did you mean train.steps?")
    assert refusal(write(tmp_path, "trian: {}")).endswith("trian: unknown key; did you mean train?")
    elsewhere = refusal(write(tmp_path, "train: {kl_budget: 0.1}"))
    assert elsewhere.endswith("train.kl_budget: unknown key; did you mean constraints.kl_budget?")
    known = "folder, name, tracking, wandb, save_every, timeout"
    assert refusal(write(tmp_path, "run: {zzz: 1}")).endswith(f"unknown key; known are {known}")
    assert refusal(write(tmp_path, "1: {}")).endswith("keys must be strings, found 1 (an integer)")


# Types


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train: 3", "train: expected a mapping, found 3 (an integer)"),
        ("train:", "train: expected a mapping, found nothing (null)"),
        ("train: {steps: true}", "train.steps: expected an integer, found true (a boolean)"),
        ("train: {steps: 3.0}", "train.steps: expected an integer, found 3.0 (a number)"),
        ("train: {steps: '3'}", "train.steps: expected an integer, found '3' (a string)"),
        ("train: {steps: null}", "train.steps: expected an integer, found nothing (null)"),
        ("train: {length_normalised: 1}", "train.length_normalised: expected true or false, found 1 (an integer)"),
        ("train: {length_normalised: yes}", "train.length_normalised: expected true or false, found 'yes' (a string)"),
        ("train: {learning_rate: true}", "train.learning_rate: expected a finite number, found true (a boolean)"),
        ("train: {learning_rate: .nan}", "train.learning_rate: expected a finite number, found '.nan' (a string)"),
        ("train: {learning_rate: 1e999}", "train.learning_rate: expected a finite number, found inf (a number)"),
        ("model: {name: 3}", "model.name: expected a string, found 3 (an integer)"),
        ("evaluation: {scales: 1}", "evaluation.scales: expected a list, found 1 (an integer); write [1]"),
        ("evaluation: {scales: [0, x]}", "evaluation.scales[1]: expected a finite number, found 'x' (a string)"),
        ("data: {target: [1]}", "data.target: expected a mapping, found a list"),
        ("data: {target: {a: x}}", "data.target.a: expected a finite number, found 'x' (a string)"),
        ("data: {target: {1: 1.0}}", "data.target: keys must be strings, found 1 (an integer); put it in quotes"),
        ("data: {options: {a: 1, b: 1e999}}", "data.options.b: expected a plain, finite value, found inf (a number)"),
        ("data: {options: {a: !!set {x}}}", "data.options.a: expected a plain, finite value, found {'x'} (set)"),
        (
            "train: {estimator: reinfroce}",
            "train.estimator: expected one of expected, reinforce, ppo, found 'reinfroce' (a string); "
            "did you mean reinforce?",
        ),
        ("run: {tracking: 3}", "run.tracking: expected one of none, tensorboard, wandb, found 3 (an integer)"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path, text)) == f"{tmp_path / 'own.yaml'}: {reason}"


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = "{learning_rate: 5e-4, steps: 010, max_grad_norm: 2}"
    config = load_config(write(tmp_path, f"train: {text}\nrun: {{name: no}}\nmodel: {{revision: 1:30}}"))
    assert (config.train.learning_rate, config.train.steps, config.run.name) == (0.0005, 10, "no")
    assert config.model.revision == "1:30"
    assert type(config.train.max_grad_norm) is float


# Values


@pytest.mark.parametrize(
    ("section", "values", "reason"),
    [
        (ModelSection, {"name": ""}, "name: must not be empty"),
        (DataSection, {"groups": ("a",)}, "groups: must name at least two groups"),
        (DataSection, {"groups": ("a", "a")}, "groups: has a value twice: ['a', 'a']"),
        (DataSection, {"target": {"a": 0.5, "b": 0.6}}, "target: the shares must sum to 1, found 1.1"),
        (DataSection, {"target": {"a": 1.5, "b": -0.5}}, "target.a: must be within 0 and 1, found 1.5"),
        (DataSection, {"target": {"a": 1.0}, "groups": ("a", "b")}, "target: names ['a'], but groups are ['a', 'b']"),
        (DataSection, {"test_splits": ()}, "test_splits: must not be empty"),
        (DataSection, {"train_split": "test"}, "train_split: 'test' is also a test split"),
        (DataSection, {"validation_split": "train"}, "validation_split: 'train' is also the train split"),
        (SteeringSection, {"operator": "low_rank"}, "rank: operator low_rank needs one, as in rank: 4"),
        (SteeringSection, {"rank": 4}, "rank: operator affine has none; remove it"),
        (SteeringSection, {"operator": "low_rank", "rank": 0}, "rank: must be at least 1, found 0"),
        (SteeringSection, {"sites": ()}, "sites: must not be empty"),
        (TrainSection, {"steps": 0}, "steps: must be at least 1, found 0"),
        (TrainSection, {"ambiguous": -1}, "ambiguous: must be at least 1, found -1"),
        (TrainSection, {"unambiguous": -1}, "unambiguous: must be at least 0, found -1"),
        (TrainSection, {"learning_rate": 0.0}, "learning_rate: must be above 0, found 0.0"),
        (TrainSection, {"learning_rate": float("nan")}, "learning_rate: must be above 0, found nan"),
        (TrainSection, {"batch_weight": 1.1}, "batch_weight: must be within 0 and 1, found 1.1"),
        (TrainSection, {"preference_decay": 1.0}, "preference_decay: must be within 0 and below 1"),
        (TrainSection, {"dead_zone": 1.0}, "dead_zone: must be below 1"),
        (TrainSection, {"preference": "blocked", "common_weight": 0.5}, "common_weight: below 1 it needs preference"),
        (TrainSection, {"estimator": "ppo", "pooling": "logarithmic"}, "pooling: logarithmic needs estimator expected"),
        (TrainSection, {"clip_range": 0.0}, "clip_range: must be between 0 and 1, found 0.0"),
        (TrainSection, {"abstain_reward": -2.0}, "abstain_reward: must be within -1 and 1, found -2.0"),
        (TrainSection, {"seed": 2**32}, "seed: must be within 0 and 4294967295, found 4294967296"),
        (TrainSection, {"threads": 0}, "threads: must be at least 1, found 0"),
        (ConstraintsSection, {"kl_budget": 0.0}, "kl_budget: must be above 0, found 0.0"),
        (ConstraintsSection, {"kl_coefficient": 0.1}, "kl_coefficient: contradicts kl_budget"),
        (ConstraintsSection, {"sparsity": -1.0}, "sparsity: must be at least 0, found -1.0"),
        (EvaluationSection, {"every": 0}, "every: must be at least 1, found 0"),
        (EvaluationSection, {"scales": (0.0, 0.0)}, "scales: must rise, found [0.0, 0.0]"),
        (EvaluationSection, {"scales": (0.0, -1.0)}, "scales[1]: must be at least 0, found -1.0"),
        (RunSection, {"name": "a/b"}, "name: must be a name, not a path, found 'a/b'"),
        (RunSection, {"name": ".."}, "name: must be a name, not a path, found '..'"),
    ],
)
def test_an_impossible_value_is_refused_wherever_it_comes_from(section: type, values: dict, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert str(caught.value).startswith(reason)


def test_an_impossible_value_in_a_file_is_refused_with_its_dotted_path(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "constraints: {kl_coefficient: 0.1}"))
    assert "own.yaml: constraints.kl_coefficient: contradicts kl_budget" in message
    fixed = load_config(write(tmp_path, "constraints: {kl_coefficient: 0.1, kl_budget: null}")).constraints
    assert (fixed.kl_coefficient, fixed.kl_budget) == (0.1, None)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().train.steps = 3  # type: ignore[misc]


# Overrides


def test_overrides_replace_single_values_and_the_last_one_wins() -> None:
    given_ones = ["train.steps=3", "train.steps=4", "train.learning_rate=1e-3", "evaluation.scales=[0, 1]"]
    config = load_config(DEFAULT, [*given_ones, "data.options.pairs=8", "data.target={a: 0.25, b: .75}", "run.name="])
    assert (config.train.steps, config.train.learning_rate, config.evaluation.scales) == (4, 0.001, (0.0, 1.0))
    assert config.data.options["pairs"] == 8
    assert config.data.target == {"a": 0.25, "b": 0.75}
    assert config.run.name is None
    default = load_config(DEFAULT).train
    same = dataclasses.replace(config.train, steps=default.steps, learning_rate=default.learning_rate)
    assert same == default


def test_an_override_keeps_what_else_the_file_says(tmp_path: Path) -> None:
    shared = "model: &shared {name: m}\ndata: {options: {a: 1, b: *shared}, target: {x: 0.5, y: 0.5}}\n"
    config = load_config(write(tmp_path, shared), ["data.options.b.name=n", "data.target.x=0.25", "data.target.y=0.75"])
    assert config.data.options == {"a": 1, "b": {"name": "n"}}
    assert config.data.target == {"x": 0.25, "y": 0.75}
    assert config.model.name == "m"  # the anchor's other use is not touched


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.stpes=3", "train.stpes: unknown key; did you mean train.steps?"),
        ("trian.steps=3", "trian: unknown key; did you mean train?"),
        ("steps=3", "steps: unknown key; did you mean train.steps?"),
        ("train.steps=many", "train.steps: expected an integer, found 'many' (a string)"),
        ("train.steps=0", "train.steps: must be at least 1, found 0"),
        ("train.steps.x=1", "train.steps: expected an integer, found a mapping"),
        ("evaluation.scales=[1, true]", "evaluation.scales[1]: expected a finite number, found true (a boolean)"),
        ("data.target.a=0.5", "data.target: the shares must sum to 1, found 0.5"),
        ("train={steps: 3}", "train: this is a section; set its values one by one, as in train.estimator=..."),
        ("train.steps", "expected key=value with a dotted key, as in train.steps=50"),
        ("=3", "expected key=value with a dotted key, as in train.steps=50"),
        ("train..steps=3", "expected key=value with a dotted key, as in train.steps=50"),
        ("train.steps=[", "line 1, column 2: not valid YAML: expected the node content, but found '<stream end>'"),
    ],
)
def test_a_mistaken_override_is_refused_by_name(override: str, reason: str) -> None:
    assert refusal(DEFAULT, "run.name=x", override) == f"override {override!r}: {reason}"


# Round trip


TRAPS = ["no", "5e-4", "null", "~", "010", "1:30", "2001-01-01", "<<", "=", "#x", " ", "a\n", "\x85t", "\u2028"]
TEXT = st.sampled_from(TRAPS) | st.text(min_size=1)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
SCALAR = st.none() | st.booleans() | st.integers() | NUMBER | TEXT
PLAIN = st.recursive(SCALAR, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=6)
CONFIGS = st.builds(
    TrainConfig,
    model=st.builds(ModelSection, name=TEXT, revision=st.none() | TEXT, dtype=st.sampled_from(["float32", "bfloat16"])),
    data=st.builds(
        DataSection,
        set=TEXT,
        options=st.dictionaries(TEXT, PLAIN, max_size=3),
        groups=st.none() | st.lists(TEXT, min_size=2, unique=True).map(tuple),
    ),
    train=st.builds(TrainSection, learning_rate=st.floats(1e-300, 1e300), threads=st.none() | st.integers(1)),
    constraints=st.builds(ConstraintsSection, sparsity=st.floats(0, 1), anchors=st.none() | TEXT),
    evaluation=st.builds(
        EvaluationSection,
        scales=st.lists(st.floats(0, 100), min_size=1, unique=True).map(lambda values: tuple(sorted(values))),
    ),
)


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(CONFIGS)
def test_any_config_reads_back_equal(config: TrainConfig) -> None:
    assert build(TrainConfig, parse_yaml(resolved_yaml(config))) == config
