"""The dry run: what it says of the shipped configs, and its estimates beside what real models and files take."""

from __future__ import annotations

import functools
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import pytest
import torch
from safetensors import safe_open
from small_runs import learn, letters_set, make_trainer, write_config
from tiny import byte_tokenizer, small_set, tiny_llama
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dso.errors import UserError
from dso.models.backbone import Backbone
from dso.models.embedded import EMBEDDED, ModelNotFound, embedded_folder
from dso.models.encoded import Encoded
from dso.models.scores import kl_divergence
from dso.steering.model import Steering
from dso.steering.sites import resolve_sites
from envs.task import DecisionTask
from launch.cli import main
from launch.config.schema import TrainConfig, known_configs, load_config
from launch.estimate.architecture import load_architecture, shipped_shapes
from launch.estimate.dryrun import dry_run
from launch.estimate.estimate import Batch, Launch, batch, coefficients, host_references, memory
from launch.estimate.memory import Activations, activations
from launch.estimate.vision import sight
from launch.run.session import open_session

# Published: the numbers of parameters on the models' pages. By hand: norms of a layer x layers + the final one.
MODELS = {
    "smollm2-135m": (134_515_008, 2 * 30 + 1, 576),
    "gemma3-270m": (268_098_176, 4 * 18 + 1, 640),
    "Qwen/Qwen2.5-3B-Instruct": (3_085_938_688, 2 * 36 + 1, 2048),
    "Qwen/Qwen2.5-7B-Instruct": (7_615_616_512, 2 * 28 + 1, 3584),
    "meta-llama/Llama-3.2-3B-Instruct": (3_212_749_824, 2 * 28 + 1, 3072),
    "meta-llama/Llama-3.1-8B-Instruct": (8_030_261_248, 2 * 32 + 1, 4096),
    "google/gemma-3-4b-it": (4_300_079_472, 4 * 34 + 1, 2560),
    "Qwen/Qwen2.5-VL-3B-Instruct": (3_754_622_976, 2 * 36 + 1, 2048),
    "Qwen/Qwen2.5-VL-7B-Instruct": (8_292_166_656, 2 * 28 + 1, 3584),
    "meta-llama/Llama-3.2-11B-Vision-Instruct": (10_670_220_835, 2 * 40 + 1, 4096),
}
TINY = """
model: {{name: {model}}}
data: {{set: {data}}}
train: {{max_steps: 10, ambiguous: 16, unambiguous: 2}}
evaluation: {{eval_steps: 4, scales: [0.0, 1.0]}}
"""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no converted model, no Hub cache, and a folder to write to that is looked at afterwards."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("DSO_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-hub"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


@pytest.fixture
def tiny(tmp_path: Path, model_folder: Path) -> str:
    """The path of a config over the tiny model and a small set."""
    data = tmp_path / "small.jsonl"
    data.write_text("".join(json.dumps(d.to_json()) + "\n" for d in small_set()), encoding="utf-8")
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(model=model_folder, data=data), encoding="utf-8")
    return str(path)


@functools.cache
def dry_run_of(name: str) -> str:
    """The table of a shipped config; some tests look at the same."""
    return dry_run(load_config(name), name=name)


def rows(table: str) -> dict[str, str]:
    """The first part of the table by its first column."""
    lines = table.split("\n\n")[0].splitlines()[1:]
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines)


# The shipped models and configs


@pytest.mark.parametrize("name", shipped_shapes())
def test_shipped_shapes_give_the_published_number_of_parameters_and_the_expected_sites(name: str) -> None:
    parameters, sites, width = MODELS[name]
    architecture = load_architecture(name, dtype="bfloat16")
    assert architecture.parameters == parameters
    assert architecture.weight_bytes == 2 * parameters
    assert all(parameter.is_meta for parameter in architecture.model.parameters())
    learned = coefficients(load_config("smollm2-roles", ["steering.operator=affine"]), architecture)
    assert list(learned.sites.values()) == [width] * sites
    assert learned.count == 2 * width * sites


def test_no_shape_is_shipped_that_is_not_held_against_a_published_number() -> None:
    assert set(shipped_shapes()) == set(MODELS)


def shape_of(config: TrainConfig) -> tuple[int, int, int]:
    """Of a model that comes with the package, by its own weights."""
    model = Backbone.load(config.model.name).model
    widths = resolve_sites(model, config.steering.sites)
    return sum(parameter.numel() for parameter in model.parameters()), len(widths), next(iter(widths.values()))


@pytest.mark.parametrize("name", known_configs())
def test_every_shipped_config_is_dry_run(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    table = dry_run_of(name)
    said = rows(table)
    parameters, sites, width = MODELS.get(config.model.name) or shape_of(config)
    assert said["run"] == f"runs/{name}"
    assert f"{parameters:,} parameters in {config.model.dtype} (sh" in said["model"]  # shapes shipped, or the model
    assert said["steering"].startswith(f"{config.steering.operator} at {sites} sites of width {width} (")
    each = 1 if config.steering.operator == "scale" else 2  # a, or a and b
    assert f": {each * sites * width:,} coefficients, " in said["steering"]
    step = config.train.ambiguous + config.train.unambiguous
    assert f"{config.train.max_steps} steps x {step} decisions" in said["training"]
    weights = re.search(r"^backbone weights +([\d.]+) +([\d.]+)  exact$", table, re.M)
    assert weights.groups() == (f"{parameters * (2 if config.model.dtype == 'bfloat16' else 4) / 1e9:.2f}",) * 2
    assert list(Path.cwd().iterdir()) == []


PUBLISHED = [name for name in known_configs() if "/" in load_config(name).model.name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_models_config_has_the_papers_settings_and_runs_without_its_data(name: str) -> None:
    config = load_config(name)
    assert (config.steering.operator, config.steering.sites) == ("affine", None)  # every norm of the language backbone
    assert (config.train.estimator, config.train.reward, config.train.unambiguous) == ("reinforce", "sign", 0)
    assert config.data.options["hold_out"]["keep"]["train"] == 600
    said = rows(dry_run_of(name))
    path = config.data.options["path"]
    assert said["decisions"] == f"{config.data.set}; {path} is not there, so numbers are those that the config states"
    assert said["train"].startswith("at most 600 ambiguous")
    rounds = config.train.max_steps * config.train.ambiguous / 600
    assert said["training"].endswith(f", {rounds:.1f} times the ambiguous ones") and rounds == int(rounds)
    assert "(600 training prompts)" in said["host memory"]


def test_the_papers_models_are_all_there() -> None:
    assert {load_config(name).model.name for name in PUBLISHED} == set(MODELS) - set(EMBEDDED)
    sets = {name: load_config(name).data.set for name in PUBLISHED}
    assert all(name.endswith(f"-{data}") for name, data in sets.items())
    assert set(sets.values()) == {"synthbias", "socialcounterfactuals"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_documented_table_is_true(name: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / "launching.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    _, billions, sites, coefficients, *gigabytes = (cell.strip() for cell in line.strip("|").split("|"))
    parameters, expected, width = MODELS[load_config(name).model.name]
    assert (billions, int(sites)) == (f"{parameters / 1e9:.2f} B", expected)
    assert int(coefficients.replace(",", "")) == 2 * expected * width
    tables = dry_run_of(name), dry_run(load_config(name), name=name, ranks=8)
    estimated = [float(n) for table in tables for n in re.search(r"at one time +([\d.]+) +([\d.]+)", table).groups()]
    assert [int(n) for n in gigabytes] == pytest.approx(estimated, rel=0.05, abs=0.6)


# A config whose model and data are at hand


def test_the_command_says_what_a_run_will_be_and_leaves_nothing_behind(tiny: str, capsys: Any) -> None:
    assert main(["train", tiny, "--dry-run", "train.max_steps=12"]) == 0
    table = capsys.readouterr().out
    said = rows(table)
    assert said["train"] == "32 ambiguous, 8 unambiguous"  # 4 jobs x 4 couples x 2 orders, and 2 facts a couple
    assert said["training"].startswith("expected, 12 steps x 18 decisions (16 ambiguous, 2 unambiguous) = 216, 6.0 ")
    assert said["before it"] == "12 batches to measure steps in KL, 216 decisions"
    assert said["validation"] == "4 times 40 decisions"  # before the first step and after 4, 8 and 12
    assert said["test"] == "2 scales x 40 decisions"
    assert said["processes"] == "1 (no launcher)"
    assert "tokens in packed rows (a first batch, tokenised)" in said["each process"]
    assert " while loading, then up to " in said["host memory"]
    assert "(40 training prompts)" in said["host memory"]
    assert list(Path.cwd().iterdir()) == []


def test_ranks_and_deepspeed_divide_the_step(tiny: str, tmp_path: Path, capsys: Any) -> None:
    settings = tmp_path / "zero3.json"
    settings.write_text('{"zero_optimization": {"stage": 3}}', encoding="utf-8")
    accumulate = "train.gradient_accumulation_steps=2"
    assert main(["train", tiny, "--dry-run", "--ranks", "3", "--deepspeed", str(settings), accumulate]) == 0
    said = rows(capsys.readouterr().out)
    assert said["processes"] == "3 (ZeRO-3, each share in 2 parts)"
    assert said["host memory"].startswith("of each process: up to ")  # no process loads the whole model
    coefficients = 2 * 16 * 5  # a, b x width x sites of two layers
    assert said["exchanged"] == f"{4 * coefficients} bytes of gradients a step"
    # four blocks of 8 ambiguous decisions (a couple in 4 jobs and 2 orders): a batch of 16 has two, halved for 6 parts
    assert said["each process"].startswith("4 decisions at a time")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "19"), "train.ambiguous: a step of 18 decisions cannot be divided into 19 shares; raise it, or"),
        (("--deepspeed", "nowhere.json"), "nowhere.json: cannot be read"),
        (("steering.sites=[nothing.*]",), "site pattern 'nothing.*' matches no norm"),
        (("model.name=owner/unknown",), "fetch its config once with: hf download owner/unknown config.json"),
        (("model.name=no such model",), "no such folder, not embedded (smollm2-135m"),
        (("data.set=nonsense", "data.options={path: nowhere}"), "unknown decision set 'nonsense'"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line(tiny: str, capsys: Any, arguments: tuple[str, ...], message: str) -> None:
    assert main(["train", tiny, "--dry-run", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dso: ") and message in err and err.count("\n") == 1


def test_a_deepspeed_file_that_contradicts_the_config_is_refused_as_training_would(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"gradient_accumulation_steps": 4}', encoding="utf-8")
    with pytest.raises(UserError, match="bad.json: gradient_accumulation_steps is 4, but the config says 1"):
        dry_run(load_config("smollm2-roles"), name="x", deepspeed=str(tmp_path / "bad.json"))


def test_a_run_is_named_after_its_config(tmp_path: Path, tiny: str, capsys: Any) -> None:
    """A model's "2.5" is no suffix of a file."""
    assert main(["train", "qwen2.5-3b-synthbias", "--dry-run"]) == 0
    assert rows(capsys.readouterr().out)["run"] == "runs/qwen2.5-3b-synthbias"
    assert main(["train", tiny, "--dry-run"]) == 0
    assert rows(capsys.readouterr().out)["run"] == "runs/tiny"


def test_shapes_come_from_the_hubs_cache_before_those_shipped(tmp_path: Path) -> None:
    name = "Qwen/Qwen2.5-3B-Instruct"
    snapshot = tmp_path / "no-hub" / "models--Qwen--Qwen2.5-3B-Instruct" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    tiny_llama(width=32).config.save_pretrained(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc", encoding="utf-8")
    architecture = load_architecture(name)
    assert architecture.source == "config.json in the Hub's local cache"
    assert architecture.parameters == sum(p.numel() for p in tiny_llama(width=32).parameters())


def test_a_config_that_no_model_can_be_made_of_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none_such"}), encoding="utf-8")
    with pytest.raises(ModelNotFound, match="no model can be made of .*config.json: .*none_such"):
        load_architecture(str(tmp_path))


def test_lengths_are_by_characters_where_there_is_no_tokenizer(tiny: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    tiny_llama().config.save_pretrained(bare)
    config = load_config(tiny, [f"model.name={bare}", "train.unambiguous=0", "train.ambiguous=8"])
    training = small_set().select(split="train")
    found = batch(config, load_architecture(str(bare)), training, Launch())
    assert "4 characters a token" in found.source
    # "Ann and Bob: the nurse is" has 25 characters: 7 tokens; " Ann" one
    assert {(len(e.prompt), tuple(map(len, e.candidates))) for e in found.encoded} == {(7, (1, 1))}
    assert len({e.prompt[0] for e in found.encoded}) == 8  # nothing is shared


# Estimates beside what is measured


def saved(model: nn.Module, parameters: Any, work: Callable[[], Any]) -> dict[int, Any]:
    """The storages that autograd saves on a real device, by address; parameters not."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), *parameters]}
    held: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return held


def total(storages: dict[int, Any]) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def on_meta(trainer: Any, handles: Any, width: int, layers: int) -> tuple[nn.Module, Any, list[Encoded]]:
    model = tiny_llama(width=width, layers=layers).to("meta").requires_grad_(False)
    kinds = {site: type(operator) for site, operator in trainer.policy.steering.operators.items()}
    with torch.device("meta"):
        operators = {site: kind(width) for site, kind in kinds.items()}
    return model, operators, [trainer.task.backbone.encode(d) for d in trainer.task.pick(handles)]


@pytest.mark.parametrize(("operator", "width", "layers"), [("affine", 16, 2), ("affine", 64, 6), ("bias", 64, 2)])
def test_activations_are_what_a_real_training_pass_saves(
    operator: str, width: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("small_runs.tiny_llama", lambda width: tiny_llama(width=width, layers=layers))
    trainer = make_trainer(width=width, operator=operator)
    handles = trainer.env.inner.sampler.draw()
    reference = trainer.task.reference(handles)

    def work() -> torch.Tensor:
        outcome = trainer.policy.decide(handles, next_token=True)
        return outcome.log_policy.exp().sum() + kl_divergence(outcome.next_token, reference).mean()

    measured = total(saved(trainer.task.backbone.model, trainer.policy.steering.parameters(), work))
    model, operators, encoded = on_meta(trainer, handles, width, layers)
    estimated = activations(model, operators, encoded, max_tokens=512)
    assert estimated.share == 1.0
    assert estimated.kept == pytest.approx(measured, rel=0.01)


def test_with_gradient_checkpointing_layers_keep_their_inputs_only() -> None:
    width, layers = 64, 6
    trainer = make_trainer(width=width)
    handles = trainer.env.inner.sampler.draw()
    model, operators, encoded = on_meta(trainer, handles, width, layers)
    estimated = activations(model, operators, encoded, max_tokens=512)

    real = tiny_llama(width=width, layers=layers)
    backbone = Backbone(real, byte_tokenizer(), "tiny", layout="packed")
    steering = Steering.for_model(real)
    steering.attach(real)
    real.train()  # layers are checkpointed in training mode only
    real.activation_checkpointing_enable()
    inputs: dict[int, Any] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        for value in (*args, *kwargs.values()):
            for part in value if isinstance(value, tuple) else (value,):
                if torch.is_tensor(part):
                    inputs[part.untyped_storage().data_ptr()] = part.untyped_storage()

    for module in real.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(keep, with_kwargs=True)
    decisions = trainer.task.pick(handles)
    reference = torch.zeros(len(decisions), real.config.vocab_size)

    def work() -> torch.Tensor:
        scores = backbone.score(decisions, next_token=True)
        return scores.policy().exp().sum() + kl_divergence(scores.next_token, reference).mean()

    kept = total(saved(real, steering.parameters(), work) | inputs)
    assert estimated.checkpointed - estimated.layer == pytest.approx(kept, rel=0.01)
    assert estimated.checkpointed < estimated.kept / 3


def test_a_part_of_a_large_batch_stands_for_all_of_it() -> None:
    trainer = make_trainer(width=16)
    model, operators, _ = on_meta(trainer, [0], 16, 2)
    prompts = [Encoded(tuple(range(place, place + 100)), ((1,), (2,))) for place in range(0, 5000, 100)]
    whole = activations(model, operators, prompts, max_tokens=512)
    assert whole.share == pytest.approx(20 / 50)  # 2,048 tokens are run
    first = activations(model, operators, prompts[:20], max_tokens=512)
    assert whole.tokens == 5000 and whole.kept == pytest.approx(2.5 * first.kept, rel=1e-6)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_tokens_that_are_said_are_those_that_a_step_passes(layout: str, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "model"
    model = architectures.tiny("Llama" if layout == "packed" else "Bloom")  # ALiBi counts columns: packing is off
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    path = write_config(tmp_path, folder, train__unambiguous=0, train__optimizer__fisher_batches=0)
    assert main(["train", str(path), "--dry-run"]) == 0
    said = re.search(r"16 decisions at a time, (\d+) tokens in (\w+) rows", capsys.readouterr().out)
    session = open_session(load_config(str(path)))
    indices = session.trainer.env.reset()
    session.trainer.task.reference(indices)  # the base model's pass comes first, and once
    passed: list[int] = []
    session.backbone.model.register_forward_pre_hook(
        lambda module, args, inputs: passed.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    session.trainer.policy.decide(indices, next_token=True)
    assert said is not None and said.groups() == (str(sum(passed)), session.backbone.layout) == (said[1], layout)


def test_files_have_the_size_that_is_said(tiny: str, tmp_path: Path, model_folder: Path) -> None:
    config = load_config(tiny)
    architecture = load_architecture(str(model_folder))
    for operator, rank in (("affine", None), ("low_rank", 3)):
        wanted = load_config(tiny, [f"steering.operator={operator}", f"steering.rank={rank or 'null'}"])
        learned = coefficients(wanted, architecture)
        model = tiny_llama()
        Steering.for_model(model, operator=operator, rank=rank).save_pretrained(tmp_path / operator)
        assert (tmp_path / operator / "dso_model.safetensors").stat().st_size == learned.checkpoint
    with safe_open(model_folder / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118  (it has no __iter__)
    assert architecture.weight_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert config.model.dtype == "float32"


@pytest.mark.parametrize(
    ("female", "male", "positions"),
    [("F", "M", 1), ("Fe", "Ma", 3), ("FM", "FF", 2), ("FMM", "F", 3)],  # behind the prompt, and what was begun
)
def test_references_on_the_host_are_what_is_said(female: str, male: str, positions: int) -> None:
    trainer = make_trainer(letters_set(facts=False, letters={"female": female, "male": male}))
    trainer.task.reference(range(16))
    kept = sum(t.numel() * t.element_size() for t in trainer.task._reference.values())
    assert kept == 16 * positions * 258 * 4
    encoded = [trainer.task.backbone.encode(d) for d in trainer.task.decisions]
    part = Batch(5, encoded[:5], sight(load_architecture("smollm2-135m"), []), "a part of them")
    assert host_references(SimpleNamespace(vocabulary=258), part, 16) == kept


def test_what_training_keeps_is_what_is_said() -> None:
    """Five numbers a coefficient in what a run goes on from."""
    trainer = learn(make_trainer(ambiguous=16), 1)
    policy = trainer.policy
    count = sum(p.numel() for p in policy.steering.parameters())
    moments = [v for state in policy.optimizer.state.values() for k, v in state.items() if v.numel() > 1]
    kept = sum(v.numel() for v in moments) + count  # and the operators themselves
    assert 3 * count <= kept <= 4 * count


def test_memory_adds_up(tiny: str, model_folder: Path) -> None:
    config = load_config(tiny, ["train.unambiguous=0"])
    architecture = load_architecture(str(model_folder))
    learned = coefficients(config, architecture)
    training = small_set().select(split="train")
    launch = Launch(ranks=4, stage=3, live=100)
    part = batch(config, architecture, training, launch)
    found = memory(config, architecture, learned, part, launch, validation=40)
    weights = architecture.weight_bytes
    assert (found.weights, found.gathered) == (-(-weights // 4), 400)  # 100 weights of 4 bytes at a time
    assert found.state == 6 * 4 * 2 * 16 * 5
    # " Ann" and " Bob" have a token a character and share the blank: 6 answer positions, behind it 2 of each
    assert part.positions == 1 + 1 + 2 + 2
    assert found.references == 40 * 6 * 258 * 4
    assert found.evaluation == 5 * 240 * 6 * 258 * 4
    assert found.backward - found.step.layer == 3 * part.size * 6 * 258 * 4
    assert found.context == 800_000_000
    resident = found.weights + 400 + found.state + found.references + found.context
    assert found.total(False) == resident + max(found.step.kept + found.backward, found.evaluation)
    assert found.total(True) == resident + max(found.step.checkpointed + found.backward, found.evaluation)
    whole = memory(config, architecture, learned, part, Launch(), validation=None)
    assert (whole.weights, whole.gathered, whole.references) == (weights, 0, None)
    on_cpu = load_config(tiny, ["model.device=cpu"])
    assert memory(on_cpu, architecture, learned, part, Launch(), None).context == 0


def test_anchor_texts_pass_with_the_decisions(tiny: str, tmp_path: Path, model_folder: Path, capsys: Any) -> None:
    (tmp_path / "anchors.txt").write_text("abc\nde fgh\n", encoding="utf-8")
    plain = load_config(tiny, ["model.device=cpu"])
    config = load_config(tiny, ["model.device=cpu", f"constraints.anchors={tmp_path / 'anchors.txt'}"])
    architecture = load_architecture(str(model_folder))
    learned = coefficients(config, architecture)
    training = small_set().select(split="train")
    parts = [batch(each, architecture, training, Launch()) for each in (plain, config)]
    found = [memory(config, architecture, learned, part, Launch(), None) for part in parts]
    # A token a character; the first one is read only, the last one is predicted only.
    ids = [byte_tokenizer()(text).input_ids for text in ("abc", "de fgh")]
    texts = [Encoded((first,), (tuple(rest),)) for first, *rest in ids]
    assert (parts[1].anchors, parts[1].texts, parts[0].texts) == (texts, 2, 0)
    assert found[1].step.tokens - found[0].step.tokens == 2 + 5
    theirs = activations(architecture.model, learned.operators, texts, max_tokens=512)
    assert found[1].step.kept == found[0].step.kept + theirs.kept
    assert found[1].step.checkpointed == found[0].step.checkpointed + theirs.checkpointed - theirs.layer
    row = 4 * architecture.vocabulary
    assert found[1].backward - found[0].backward == 3 * 7 * row
    sizes = [host_references(architecture, part, 10) for part in parts]
    assert sizes[1] - sizes[0] == 7 * row
    assert batch(config, architecture, training, Launch(ranks=2)).texts == 1
    assert main(["train", tiny, "--dry-run", f"constraints.anchors={tmp_path / 'anchors.txt'}"]) == 0
    said = rows(capsys.readouterr().out)
    assert said["each process"].startswith("18 decisions and 2 anchor texts at a time, ")
    assert "training prompts, 2 anchor texts)" in said["host memory"]


# Images


@pytest.mark.parametrize(
    ("name", "images", "tokens"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", [(1024, 512)], 37 * 18),  # pixels / (14 a patch x 2 merged) = 36.6 x 18.3
        ("Qwen/Qwen2.5-VL-7B-Instruct", [(512, 512)] * 2, 2 * 18 * 18),
        ("google/gemma-3-4b-it", [(1024, 512)], 256),  # whatever the size
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", [(512, 512)] * 2, 2),  # a place in the text each
        ("Qwen/Qwen2.5-3B-Instruct", [(512, 512)], 0),
    ],
)
def test_images_add_their_tokens(name: str, images: list[tuple[int, int]], tokens: int) -> None:
    assert sight(load_architecture(name, dtype="bfloat16"), images).tokens == tokens


def test_a_published_sets_decision_has_one_picture_of_both_people_or_two() -> None:
    name = "qwen2.5-vl-7b-socialcounterfactuals"
    architecture = load_architecture("Qwen/Qwen2.5-VL-7B-Instruct", dtype="bfloat16")
    for layout, tokens in (("side_by_side", 37 * 18), ("two", 2 * 18 * 18)):
        config = load_config(name, [f"data.options.layout={layout}"])
        found = batch(config, architecture, None, Launch(ranks=8))
        assert found.size == 6 and {len(e.prompt) for e in found.encoded} == {64 + tokens}


def test_what_mllamas_text_attends_to_is_counted() -> None:
    architecture = load_architecture("meta-llama/Llama-3.2-11B-Vision-Instruct", dtype="bfloat16")
    seen = sight(architecture, [(512, 512)] * 2)
    states = 2 * 4 * ((560 // 14) ** 2 + 1)  # images x tiles x patches
    operators = coefficients(load_config("smollm2-roles"), architecture).operators
    prompt = [Encoded(tuple(range(20)), ((1,), (2,)))]

    def kept(inputs: Any) -> Activations:
        return activations(architecture.model, operators, prompt, max_tokens=512, inputs=inputs)

    keys_and_values = 8 * 2 * 32 * states * 128 * 2  # layers x both x heads x states x head width x bytes
    without, with_images = kept(None), kept(seen.inputs)
    assert keys_and_values < with_images.kept - without.kept < 1.3 * keys_and_values


# The real model


@pytest.mark.slow
def test_the_embedded_model_takes_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSO_CACHE")
    config = load_config("smollm2-roles", ["model.device=cpu"])
    embedded_folder("smollm2-135m")
    architecture = load_architecture("smollm2-135m")
    assert architecture.source == "converted before"
    with safe_open(architecture.folder / "model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    assert architecture.weight_bytes == 4 * sum(torch.Size(shape).numel() for shape in shapes) == 538_060_032

    session = open_session(config)
    trainer = session.trainer
    handles = trainer.env.inner.sampler.draw()
    reference = torch.zeros(len(handles), architecture.vocabulary)

    def work() -> torch.Tensor:
        outcome = trainer.policy.decide(handles, next_token=True)
        return outcome.log_policy.exp().sum() + kl_divergence(outcome.next_token, reference).mean()

    measured = total(saved(session.backbone.model, session.steering.parameters(), work))
    training = session.decisions.select(split="train")
    learned = coefficients(config, architecture)
    part = batch(config, architecture, training, Launch())
    estimated = memory(config, architecture, learned, part, Launch(), None).step
    assert estimated.kept == pytest.approx(measured, rel=0.05)
    assert isinstance(trainer.task, DecisionTask)
