"""The typed config: every shipped file parses, every mistake is refused with its dotted path and a way out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dso.models.embedded import EMBEDDED as AT_HAND
from dso.steering.operators import KINDS
from launch.cli import main
from launch.config.keys import build, keys
from launch.config.moved import GONE, MOVED
from launch.config.reading import parse_yaml
from launch.config.reference import reference
from launch.config.schema import (
    FOLDER,
    ConfigError,
    TrainConfig,
    changes,
    in_effect,
    known_configs,
    load_config,
    resolved_yaml,
    to_dict,
)
from launch.config.sections import EMBEDDED, SteeringSection

ROOT = Path(__file__).parents[2]
DEFAULT = "smollm2-roles"
FREEFORM = "smollm2-roles-freeform"
SPARE = "vlm-scenes"  # says little beside the defaults


def write(folder: Path, text: str) -> str:
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(name, overrides)
    return str(caught.value)


def refused(**sections: Any) -> str:
    """Why plain values are refused."""
    with pytest.raises(ConfigError) as caught:
        build(TrainConfig, sections)
    return str(caught.value)


# Finding and reading


@pytest.mark.parametrize("name", known_configs())
def test_every_shipped_config_parses_and_reads_back_equal(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert load_config(write(tmp_path, resolved_yaml(config))) == config


def test_the_default_runs_are_shipped() -> None:
    assert {DEFAULT, FREEFORM} <= set(known_configs())
    assert [load_config(name).freeform for name in (DEFAULT, FREEFORM)] == [False, True]


@pytest.mark.parametrize("name", [name for name in known_configs() if "/" in load_config(name).model.name])
def test_published_configs_are_bfloat16(name: str) -> None:
    assert load_config(name).model.dtype == "bfloat16"


def test_a_path_and_a_name_give_the_same_config() -> None:
    assert load_config(str(ROOT / "configs" / f"{DEFAULT}.yaml")) == load_config(DEFAULT)


def test_folders_where_a_run_is_started_do_not_stand_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    own = tmp_path / "configs"
    own.mkdir()
    (own / "__init__.py").touch()
    for name in ("envs", "trainers"):  # theirs, not ours
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not ours')\n", encoding="utf-8")
    (tmp_path / "launch").mkdir()
    (own / f"{DEFAULT}.yaml").write_text("train: {max_steps: 1}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = [sys.executable, "-m", "launch.train", DEFAULT, "--dry-run"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "regression, 100 steps x 44 decisions" in done.stdout


def test_what_a_file_does_not_say_is_a_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "train: {max_steps: 7}\n"))
    assert config == TrainConfig(train={"max_steps": 7})
    assert (config.train.max_steps, config.train.ambiguous) == (7, 36)


def test_the_resolved_config_names_every_value_that_has_an_effect() -> None:
    raw = parse_yaml(resolved_yaml(TrainConfig()))
    assert isinstance(raw, dict)
    known = in_effect(TrainConfig())

    def named(values: dict, path: str = "") -> Iterator[str]:
        for key, value in values.items():
            below = f"{path}{key}."
            yield from named(value, below) if any(name.startswith(below) for name in known) else [below[:-1]]

    assert list(named(raw)) == known


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
    assert "own.yaml: line 3: the key 'seed' was given before, on line 2" in refusal(
        write(tmp_path, "train:\n  seed: 1\n  seed: 2\n")
    )
    assert "not valid YAML" in refusal(write(tmp_path, "a: &a [*a]\n"))
    assert "not valid YAML" in refusal(write(tmp_path, "a: !!python/object:os.system {}\n"))
    (tmp_path / "own.yaml").write_bytes(b"train: \xff\n")
    assert "own.yaml: not valid UTF-8 at byte 7" in refusal(str(tmp_path / "own.yaml"))


# Keys


def test_a_user_meets_at_most_35_keys() -> None:
    by_launcher = {key.path for key in keys(TrainConfig) if key.facts.launcher}
    assert by_launcher == {"run.ddp_timeout"}
    assert len(set(in_effect(load_config(DEFAULT))) - by_launcher) <= 35
    more = set(in_effect(load_config(FREEFORM))) - set(in_effect(load_config(SPARE)))
    assert len(more) == 11  # how answers are sampled, read and measured


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    known = "train.maxsteps: unknown key; did you mean train.max_steps?"
    assert refusal(write(tmp_path, "train: {maxsteps: 3}")).endswith(known)
    assert refusal(write(tmp_path, "trian: {}")).endswith("trian: unknown key; did you mean train?")
    elsewhere = refusal(write(tmp_path, "train: {kl_budget: 0.1}"))
    assert elsewhere.endswith("train.kl_budget: unknown key; did you mean constraints.kl_budget?")
    below = refusal(write(tmp_path, "train: {optimizer: {learning_rat: 0.1}}"))
    assert below.endswith("learning_rat: unknown key; did you mean train.optimizer.learning_rate?")
    known = "output_dir, run_name, report_to, save_steps, ddp_timeout, wandb"
    assert refusal(write(tmp_path, "run: {zzz: 1}")).endswith(f"unknown key; known are {known}")
    assert refusal(write(tmp_path, "1: {}")).endswith("keys must be strings, found 1 (an integer)")


def test_an_old_key_is_refused_with_what_it_is_called_now(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, "train: {steps: 3}")).endswith("own.yaml: train.steps: is now train.max_steps")
    assert refusal(DEFAULT, "run.folder=x") == "override 'run.folder=x': run.folder: is now run.output_dir"
    assert refusal(DEFAULT, "train.preference=context").endswith("train.preference: is now train.preference.estimate")
    assert "train.threads: is no longer a key: set OMP_NUM_THREADS" in refusal(DEFAULT, "train.threads=1")


def test_what_old_keys_are_called_now_is_a_key() -> None:
    known = {key.path for key in keys(TrainConfig)}
    assert {new.partition(",")[0] for new in MOVED.values()} - known == {"data.options.groups"}  # an option of a set
    assert not known & (set(MOVED) | set(GONE))


ALTERNATIVES = {
    "train.ppo.n_epochs=2": "train.estimator=ppo",
    "train.ppo.clip_range=0.3": "train.estimator=ppo",
    "train.baseline=none": "train.estimator=reinforce",
    "train.preference.hard=true": "train.estimator=reinforce",
    "train.preference.batch_weight=0.5": "train.preference.estimate=context",
    "train.freeform.num_generations=2": "train.estimator=grpo",
    "matcher.rule=only": "train.estimator=rloo",
    "evaluation.samples=2": "train.estimator=grpo",
    "constraints.max_accuracy_loss=0.1": "train.estimator=grpo",
    "constraints.beta=0.1": "constraints.kl_budget=null",
    "steering.rank=2": "steering.operator=low_rank",
    "constraints.neutral_texts=x.txt": "constraints.neutral_kl=0.1",
    "run.wandb.project=x": "run.report_to=wandb",
    "model.revision=v1": "model.name=a/b",
    "model.attn_implementation=eager": "model.name=a/b",
    "train.full_determinism=true": "model.device=cuda",
}
LOST = {
    "train.preference.common_weight=0.5": "train.preference.estimate=blocked",
    "train.preference.pooling=logarithmic": "train.estimator=ppo",
    "train.unambiguous_weight=0.5": "train.unambiguous=0",
    "constraints.minimum_beta=0.1": "constraints.kl_budget=null",
    "constraints.min_answer_mass=0.9": "train.estimator=grpo",
    "constraints.neutral_kl=0.1": "train.estimator=grpo",
    "constraints.unambiguous_kl=0.1": "train.estimator=grpo",
    "constraints.order_increase=0.1": "train.estimator=grpo",
    "train.reward=sign": "train.estimator=regression",
    "train.preference.estimate=blocked": "train.estimator=regression",
    "constraints.anchors=shipped": "train.estimator=grpo",
}


@pytest.mark.parametrize(("key", "needed"), ALTERNATIVES.items())
def test_what_has_no_effect_cannot_be_set(key: str, needed: str) -> None:
    path, cause = key.split("=")[0], needed.split("=")[0]
    message = refusal(SPARE, key)
    assert message.startswith(f"override {key!r}: {path}: has no effect, as {cause} is ")
    assert path in in_effect(load_config(SPARE, [needed, key]))


@pytest.mark.parametrize(("key", "change"), LOST.items())
def test_what_no_longer_has_an_effect_cannot_be_set(key: str, change: str) -> None:
    path = key.split("=")[0]
    assert path in in_effect(load_config(SPARE, [key]))
    assert f"{path}: has no effect, as {change.split('=')[0]} is " in refusal(SPARE, change, key)


def test_every_condition_is_tried() -> None:
    tried = {key.split("=")[0] for key in (*ALTERNATIVES, *LOST)}
    sections = ("train.freeform.", "matcher.", "run.wandb.")
    conditional = {key.path for key in keys(TrainConfig) if key.facts.when} - {"steering.init"}  # needs to be set
    assert {path for path in conditional - tried if not path.startswith(sections)} == set()


def test_what_an_override_makes_moot_in_a_file_is_dropped(tmp_path: Path) -> None:
    path = write(tmp_path, "constraints: {kl_budget: 0.1, minimum_beta: 0.1}\ntrain: {unambiguous_weight: 0.5}\n")
    config = load_config(path, ["constraints.kl_budget=null", "constraints.beta=0.2"])
    assert (config.constraints.kl_budget, config.constraints.beta) == (None, 0.2)
    assert "constraints.minimum_beta" not in in_effect(config)
    on_candidates = load_config(FREEFORM, ["train.estimator=expected"])
    assert "train.freeform.num_generations" not in in_effect(on_candidates)
    assert on_candidates.train.preference.estimate == "controlled"


def test_free_form_runs_have_defaults_of_their_own() -> None:
    config = TrainConfig(train={"estimator": "rloo"})
    train = config.train
    assert (train.max_steps, train.ambiguous, train.unambiguous_weight) == (60, 24, 0.2)
    assert (train.optimizer.learning_rate, train.preference.estimate) == (1e-3, "blocked")
    assert (config.constraints.minimum_beta, config.evaluation.scales) == (0.05, (0.0, 1.0))
    assert config.data.options == {"texts": "questions"}
    own = TrainConfig(train={"estimator": "rloo", "max_steps": 5}, data={"set": "own.jsonl"})
    assert (own.train.max_steps, own.data.options) == (5, {})


def test_operators_and_embedded_models_are_those_that_there_are() -> None:
    assert set(get_args(SteeringSection.model_fields["operator"].annotation)) == set(KINDS)
    assert set(AT_HAND) <= set(EMBEDDED)


# Types


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train: 3", "train: expected a mapping, found 3 (an integer)"),
        ("train:", "train: expected a mapping, found nothing (null)"),
        ("train: {optimizer: 3}", "train.optimizer: expected a mapping, found 3 (an integer)"),
        ("train: {max_steps: true}", "train.max_steps: expected an integer, found true (a boolean)"),
        ("train: {max_steps: 3.0}", "train.max_steps: expected an integer, found 3.0 (a number)"),
        ("train: {max_steps: '3'}", "train.max_steps: expected an integer, found '3' (a string)"),
        ("train: {max_steps: null}", "train.max_steps: expected an integer, found nothing (null)"),
        (
            "train: {gradient_checkpointing: 1}",
            "train.gradient_checkpointing: expected true or false, found 1 (an integer)",
        ),
        (
            "train: {gradient_checkpointing: yes}",
            "train.gradient_checkpointing: expected true or false, found 'yes' (a string)",
        ),
        ("constraints: {sparsity: true}", "constraints.sparsity: expected a finite number, found true (a boolean)"),
        ("constraints: {sparsity: .nan}", "constraints.sparsity: expected a finite number, found '.nan' (a string)"),
        ("constraints: {sparsity: 1e999}", "constraints.sparsity: expected a finite number, found inf (a number)"),
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
            "train.estimator: expected one of regression, expected, reinforce, ppo, grpo, rloo, "
            "found 'reinfroce' (a string); "
            "did you mean reinforce?",
        ),
        ("run: {report_to: 3}", "run.report_to: expected one of none, tensorboard, wandb, found 3 (an integer)"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path, text)) == f"{tmp_path / 'own.yaml'}: {reason}"


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = "{optimizer: {learning_rate: 5e-4}, max_steps: 010}\nconstraints: {sparsity: 2}"
    config = load_config(write(tmp_path, f"train: {text}\nrun: {{run_name: no}}\nmodel: {{device: 1:30}}"))
    assert (config.train.optimizer.learning_rate, config.train.max_steps, config.run.run_name) == (0.0005, 10, "no")
    assert config.model.device == "1:30"
    assert type(config.constraints.sparsity) is float


# Values


@pytest.mark.parametrize(
    ("path", "values", "reason"),
    [
        ("model", {"name": ""}, "name: must not be empty"),
        ("data", {"target": {"a": 0.5, "b": 0.6}}, "target: the shares must sum to 1, found 1.1"),
        ("data", {"target": {"a": 1.5, "b": -0.5}}, "target.a: must be within 0 and 1, found 1.5"),
        ("steering", {"operator": "low_rank"}, "rank: operator low_rank needs one, as in rank: 4"),
        ("steering", {"operator": "low_rank", "rank": 0}, "rank: must be at least 1, found 0"),
        ("steering", {"sites": []}, "sites: must not be empty"),
        ("steering", {"sites": ["a", "a"]}, "sites: has a value twice: ['a', 'a']"),
        ("train", {"max_steps": 0}, "max_steps: must be at least 1, found 0"),
        ("train", {"ambiguous": -1}, "ambiguous: must be at least 1, found -1"),
        ("train", {"unambiguous": -1}, "unambiguous: must be at least 0, found -1"),
        ("train", {"optimizer": {"learning_rate": 0.0}}, "optimizer.learning_rate: must be above 0, found 0.0"),
        ("train", {"gradient_accumulation_steps": 45}, "gradient_accumulation_steps: a step has fewer decisions than"),
        ("train", {"preference": {"common_weight": 1.5}}, "preference.common_weight: must be at most 1, found 1.5"),
        ("train", {"estimator": "ppo", "ppo": {"clip_range": 0.0}}, "ppo.clip_range: must be above 0, found 0.0"),
        ("train", {"estimator": "ppo", "ppo": {"clip_range": 1.0}}, "ppo.clip_range: must be below 1, found 1.0"),
        ("train", {"seed": 2**32}, "seed: must be at most 4294967295, found 4294967296"),
        ("constraints", {"kl_budget": 0.0}, "kl_budget: must be above 0, found 0.0"),
        ("constraints", {"sparsity": -1.0}, "sparsity: must be at least 0, found -1.0"),
        ("evaluation", {"eval_steps": 0}, "eval_steps: must be at least 1, found 0"),
        ("evaluation", {"scales": [0.0, 0.0]}, "scales: must rise, found [0.0, 0.0]"),
        ("evaluation", {"scales": [-1.0]}, "scales[0]: must be at least 0, found -1.0"),
        ("evaluation", {"scales": []}, "scales: must not be empty"),
        ("run", {"run_name": "a/b"}, "run_name: must be a name, not a path, found 'a/b'"),
        ("run", {"run_name": ".."}, "run_name: must be a name, not a path, found '..'"),
        ("run", {"report_to": "wandb", "wandb": {"tags": ["a", "a"]}}, "wandb.tags: has a value twice: ['a', 'a']"),
        ("run", {"report_to": "wandb", "wandb": {"project": "a/b"}}, "wandb.project: must be up to 128 characters"),
    ],
)
def test_an_impossible_value_is_refused(path: str, values: dict, reason: str) -> None:
    assert refused(**{path: values}).startswith(f"{path}.{reason}")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        TrainConfig().train.max_steps = 3  # type: ignore[misc]


# Overrides


def test_overrides_replace_single_values_and_the_last_one_wins() -> None:
    given_ones = ["train.max_steps=3", "train.max_steps=4", "train.optimizer.learning_rate=1e-3"]
    more = ["evaluation.scales=[0, 1]", "data.options.pairs=8", "data.target={a: 0.25, b: .75}", "run.run_name="]
    config = load_config(DEFAULT, [*given_ones, *more])
    train, default = config.train, load_config(DEFAULT).train
    assert (train.max_steps, train.optimizer.learning_rate, config.evaluation.scales) == (4, 0.001, (0.0, 1.0))
    assert config.data.options["pairs"] == 8
    assert config.data.target == {"a": 0.25, "b": 0.75}
    assert config.run.run_name is None
    assert train.model_copy(update={"max_steps": default.max_steps, "optimizer": default.optimizer}) == default


def test_an_override_keeps_what_else_the_file_says(tmp_path: Path) -> None:
    shared = "model: &shared {name: m}\ndata: {options: {a: 1, b: *shared}, target: {x: 0.5, y: 0.5}}\n"
    config = load_config(write(tmp_path, shared), ["data.options.b.name=n", "data.target.x=0.25", "data.target.y=0.75"])
    assert config.data.options == {"a": 1, "b": {"name": "n"}}
    assert config.data.target == {"x": 0.25, "y": 0.75}
    assert config.model.name == "m"  # the anchor's other use is not touched


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.maxsteps=3", "train.maxsteps: unknown key; did you mean train.max_steps?"),
        ("trian.max_steps=3", "trian: unknown key; did you mean train?"),
        ("max_steps=3", "max_steps: unknown key; did you mean train.max_steps?"),
        ("train.max_steps=many", "train.max_steps: expected an integer, found 'many' (a string)"),
        ("train.max_steps=0", "train.max_steps: must be at least 1, found 0"),
        ("train.max_steps.x=1", "train.max_steps: expected an integer, found a mapping"),
        ("evaluation.scales=[1, true]", "evaluation.scales[1]: expected a finite number, found true (a boolean)"),
        ("data.target.a=0.5", "data.target: the shares must sum to 1, found 0.5"),
        ("train={seed: 3}", "train: this is a section; set its values one by one, as in train.estimator=..."),
        (
            "train.ppo={n_epochs: 3}",
            "train.ppo: this is a section; set its values one by one, as in train.ppo.n_epochs=...",
        ),
        ("train.max_steps", "expected key=value with a dotted key, as in train.max_steps=50"),
        ("=3", "expected key=value with a dotted key, as in train.max_steps=50"),
        ("train..max_steps=3", "expected key=value with a dotted key, as in train.max_steps=50"),
        ("train.max_steps=[", "line 1, column 2: not valid YAML: expected the node content, but found '<stream end>'"),
    ],
)
def test_a_mistaken_override_is_refused_by_name(override: str, reason: str) -> None:
    assert refusal(DEFAULT, "run.run_name=x", override) == f"override {override!r}: {reason}"


# Going on with another config


def test_what_does_not_change_a_run_may_change_when_it_goes_on() -> None:
    free = [
        "train.gradient_accumulation_steps=2", "train.gradient_checkpointing=true", "model.max_tokens=99",
        "model.device=cpu", "run.save_steps=1", "run.report_to=wandb", "run.wandb.mode=offline",
    ]  # fmt: skip
    before = load_config(SPARE)
    assert changes(before, load_config(SPARE, free)) == []
    after = load_config(SPARE, [*free, "train.seed=3", "steering.operator=low_rank", "steering.rank=2"])
    assert changes(before, after) == [
        "steering.operator was 'affine' and is 'low_rank'",
        "steering.rank was None and is 2",
        "train.seed was 0 and is 3",
    ]


# What is written of the keys


def test_the_reference_is_that_of_the_sections() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference(), "make it again with: dso config --reference > docs/config.md"
    for key in keys(TrainConfig):
        assert f"| `{key.path.rsplit('.', 1)[-1]}`" in page


def test_the_command_prints_a_config_the_schema_and_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", DEFAULT, "train.max_steps=7"]) == 0
    assert parse_yaml(capsys.readouterr().out) == to_dict(load_config(DEFAULT, ["train.max_steps=7"]))
    assert main(["config", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["PPOSection"]["properties"]["n_epochs"]["minimum"] == 1
    assert schema["$defs"]["TrainSection"]["properties"]["max_steps"]["x-default-freeform"] == 60
    assert main(["config", "--reference"]) == 0
    assert capsys.readouterr().out == reference()
    assert main(["config"]) == 2
    assert "name a config" in capsys.readouterr().err


def test_the_shipped_configs_are_beside_the_package() -> None:
    assert FOLDER == ROOT / "configs"


# Round trip


TRAPS = ["no", "5e-4", "null", "~", "010", "1:30", "2001-01-01", "<<", "=", "#x", " ", "a\n", "\x85t", "\u2028"]
TEXT = st.sampled_from(TRAPS) | st.text(min_size=1)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
SCALAR = st.none() | st.booleans() | st.integers() | NUMBER | TEXT
PLAIN = st.recursive(SCALAR, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=6)
CONFIGS = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"name": TEXT, "dtype": st.sampled_from(["float32", "bfloat16"])}),
        "data": st.fixed_dictionaries({"set": TEXT, "options": st.dictionaries(TEXT, PLAIN, max_size=3)}),
        "train": st.fixed_dictionaries(
            {
                "estimator": st.sampled_from(["regression", "expected", "reinforce", "ppo", "grpo", "rloo"]),
                "optimizer": st.fixed_dictionaries({"learning_rate": st.floats(1e-300, 1e300)}),
                "seed": st.integers(0, 2**32 - 1),
            }
        ),
        "constraints": st.fixed_dictionaries({"sparsity": st.floats(0, 1), "kl_budget": st.sampled_from([None, 0.5])}),
        "evaluation": st.fixed_dictionaries(
            {"scales": st.lists(st.floats(0, 1e9), min_size=1, unique=True).map(sorted)}
        ),
    }
)


@given(CONFIGS)
@settings(max_examples=100, deadline=None)
def test_any_config_reads_back_equal(values: dict) -> None:
    config = build(TrainConfig, values)
    assert build(TrainConfig, parse_yaml(resolved_yaml(config))) == config
