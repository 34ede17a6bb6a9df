"""Several processes: what they are told, how a batch is divided, and what keeps them together; without a launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny
from small_runs import learn, letters_set, make_trainer, operators, write_config
from tiny import tiny_llama
from torch.distributions import Categorical
from transformers import AutoModelForCausalLM

from dso.decisions.sampler import divide
from dso.errors import UserError
from dso.evaluation.evaluator import Evaluator
from dso.steering.model import Steering
from launch import cli
from launch.cluster.processes import ZERO, LaunchError, open_world, process_device, read_deepspeed
from launch.config.schema import TrainConfig, load_config
from tools.bench.scaling import EXCHANGES, Exchanges, merged, table, work
from trainers.checkpointing import checkpoint_layers
from trainers.constraints import KLBudget, sparsity
from trainers.fisher import Share, draw
from trainers.measuring import SharedEvaluator
from trainers.optimizer import SteeringAdam
from trainers.parallel.engine import complete
from trainers.parallel.ranks import World, _is_lost

ROOT = Path(__file__).parents[2]
JSONS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


# One process


def test_one_process_agrees_with_itself() -> None:
    world, values = World(), torch.tensor([1.0, 2.0])
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert torch.equal(world.all_sum(values), values)
    assert (world.most(3), world.agree(True), world.agree(False)) == (3, True, False)
    assert world.broadcast_object({"a": 1}) == {"a": 1}
    world.barrier()
    world.require(None)
    with pytest.raises(UserError, match="no room"):
        world.require(UserError("no room"))
    world.close()


def test_one_process_imports_nothing_of_a_launcher(tmp_path: Path, model_folder: Path) -> None:
    config = write_config(tmp_path, model_folder)
    source = f"""
import sys
from launch.cli import main
assert main(["train", {str(config)!r}, "train.max_steps=1", "--quiet"]) == 0
assert "torch" in sys.modules and "deepspeed" not in sys.modules, "deepspeed was imported"
import torch.distributed
assert not torch.distributed.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


# Dividing a batch


def test_blocks_stay_whole_and_shares_are_of_much_the_same_size() -> None:
    blocks = [7] * 12 + [3] * 12 + [5] * 12 + [1, 1, 2, 2, 4, 4, 6, 6]
    for parts, wanted in ((1, [44]), (2, [24, 20]), (3, [16, 14, 14])):
        divided = divide(blocks, parts)
        assert sorted(map(len, divided), reverse=True) == wanted
        assert sorted(np.concatenate(divided).tolist()) == list(range(44))
        assert all(part.tolist() == sorted(part) for part in divided)
        owners = [{number for number, part in enumerate(divided) if set(part) & set(np.flatnonzero(blocks == b))}
                  for b in np.unique(blocks)]  # fmt: skip
        assert all(len(owner) == 1 for owner in owners)


def test_blocks_are_halved_only_where_there_are_too_few() -> None:
    divided = divide([0] * 6 + [1] * 3, 4)
    assert [part.tolist() for part in divided] == [[0, 1, 2], [3, 4, 5], [7, 8], [6]]
    assert [part.tolist() for part in divide([0, 0, 0], 3)] == [[0], [1], [2]]
    with pytest.raises(ValueError, match="2 decisions cannot be divided into 3 parts"):
        divide([0, 1], 3)


def test_the_share_of_a_batch_draws_what_the_whole_batch_draws() -> None:
    log_probs = torch.randn(10, 50).log_softmax(-1)
    torch.manual_seed(3)
    tokens, signs = draw(log_probs)
    after = torch.get_rng_state()
    assert tokens.tolist() != log_probs.argmax(-1).tolist()
    for rows in (torch.arange(10), torch.tensor([1, 4, 8])):
        torch.manual_seed(3)
        found = Share(rows, 10, lambda values: values).draw(log_probs[rows])
        assert torch.equal(found[0], tokens[rows])
        assert torch.equal(found[1], signs[rows])
        assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(3)
    assert torch.equal(Categorical(logits=log_probs).sample(), tokens)


# The optimiser and its state


def test_a_primed_optimizer_is_one_before_its_first_step() -> None:
    start = torch.tensor([1.0, -2.0])
    found = []
    for primed in (False, True):
        parameter = start.clone().requires_grad_()
        optimizer = SteeringAdam([parameter], lr=0.1, weight_decay=0.3)
        if primed:
            optimizer.priming = True
            optimizer.step()
            optimizer.priming = False
            assert torch.equal(parameter, start) and parameter.grad is None
            assert optimizer.state[parameter]["step"] == 0
        else:
            optimizer.state[parameter].update(
                step=torch.tensor(0.0), exp_avg=torch.zeros(2), exp_avg_sq=torch.zeros(2), size=torch.ones(2)
            )
        for _ in range(2):
            parameter.grad = torch.tensor([0.5, 4.0])
            optimizer.step()
        found.append(parameter.detach())
    assert torch.equal(*found)
    optimizer.hold = True
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(parameter.detach(), found[1])
    with pytest.raises(ValueError, match="closures"):
        optimizer.step(lambda: 0.0)


def test_the_optimizer_state_is_of_the_coefficients_alone_and_goes_on_bit_for_bit() -> None:
    options: dict[str, Any] = {"baseline": "value", "learning_rate": 0.01, "kl": KLBudget(0.05), "width": 64}
    trainer, other = make_trainer(**options), make_trainer(**options)
    trainer.whiten(2)
    learn(trainer, 2)
    state = {key: value.clone() for key, value in trainer.optimizer_state().items()}
    coefficients = sum(p.numel() for p in trainer.policy.parameters())
    assert sum(value.numel() for key, value in state.items() if "exp_avg" in key) == 2 * coefficients
    assert {key.split("/")[1] for key in state} == {"exp_avg", "exp_avg_sq", "step"}
    # What is saved of a run is this and the policy: a few numbers a coefficient, whatever the backbone has.
    saved = sum(v.numel() for part in (state, trainer.policy.state_dict()) for v in part.values())
    assert saved < 5 * coefficients < sum(p.numel() for p in trainer.task.backbone.model.parameters())
    other.policy.load_state_dict(trainer.policy.state_dict())
    other.load_optimizer_state(state)
    for each in (trainer, other):
        for parameter in each.policy.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        each.learner.step()
    assert all(torch.equal(value, operators(other)[key]) for key, value in operators(trainer).items())


# Gradient checkpointing


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2", "OPT", "Gemma3"])
def test_checkpointed_layers_have_the_same_gradients(architecture: str) -> None:
    """Bit for bit: dropout, which training mode would switch on in GPT-2 and OPT, stays off."""
    ids = torch.arange(2, 14)[None]
    found = []
    for checkpointed in (False, True):
        model = tiny(architecture).requires_grad_(False)
        steering = Steering.for_model(model)
        for number, parameter in enumerate(steering.parameters()):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
        steering.attach(model)
        if checkpointed:
            assert checkpoint_layers(model) == checkpoint_layers(model) == 2
        calls = []
        site = next(site for site in steering.config.sites if ".0." in site)
        model.get_submodule(site).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(ids, use_cache=False).logits.log_softmax(-1)[0, -1, 5].backward()
        found.append([p.grad for p in steering.parameters()])
        assert len(calls) == 1 + checkpointed  # hooks inside a layer run again with it
        assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(gradient.any() for gradient in found[0])


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    kept = []
    for checkpointed in (False, True):
        model = tiny_llama(layers=4).requires_grad_(False)
        steering = Steering.for_model(model)
        steering.attach(model)
        if checkpointed:
            checkpoint_layers(model)
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.arange(2, 66)[None], use_cache=False)
        kept.append(sum(seen.values()))
    assert kept[1] < 0.5 * kept[0]


def test_a_run_with_checkpointing_is_the_run_without(tmp_path: Path, model_folder: Path) -> None:
    found = []
    for wanted in (False, True):
        options = {"train__gradient_checkpointing": wanted, "run__run_name": str(wanted), "train__max_steps": 2}
        config = write_config(tmp_path, model_folder, **options)
        assert cli.main(["train", str(config), "--quiet"]) == 0
        found.append((tmp_path / "runs" / str(wanted) / "metrics.jsonl").read_bytes())
    assert found[0] == found[1]


# Measuring


def test_one_process_measures_what_an_evaluator_does() -> None:
    trainer = make_trainer(letters_set("female", "male", "nonbinary"))
    learn(trainer, 2)
    parts = trainer.task.backbone, trainer.task.decisions, trainer.task.handle
    told: list[int] = []
    shared = SharedEvaluator(trainer.learner, *parts, progress=told.append)
    for found, wanted in zip(shared.curve([0.0, 0.7]), Evaluator(*parts).curve([0.0, 0.7]), strict=True):
        np.testing.assert_array_equal(found.policy, wanted.policy)
        np.testing.assert_array_equal(found.answer_mass, wanted.answer_mass)
        np.testing.assert_array_equal(found.kl, wanted.kl)
    assert sum(told) == 2 * len(trainer.task.decisions)


# Host memory


def in_file(tensor: torch.Tensor, path: Path) -> bool:
    """Whether a tensor's numbers are a file's, mapped into memory."""
    mapped = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    spans = [words[0].split("-") for words in mapped if words[-1] == str(path)]
    return any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in spans)


def test_weights_in_the_checkpoints_dtype_stay_in_its_file_and_others_are_copied(tmp_path: Path) -> None:
    """So the processes of a machine share them."""
    tiny_llama().save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert next(loaded.parameters()).dtype == dtype
        found = {in_file(parameter, tmp_path / "model.safetensors") for parameter in loaded.parameters()}
        assert found == {dtype == torch.float32}


def test_zeros_are_counted_with_one_look_at_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[torch.Tensor] = []
    look = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: looks.append(self) or look(self))
    assert sparsity([torch.tensor([0.0, 1.0]), torch.tensor([0.0, -0.0, 2.0]), torch.ones(3)]) == 3 / 8
    assert len(looks) == 1
    assert sparsity([]) == 0.0


# What DeepSpeed is told


def config_of(**overrides: Any) -> TrainConfig:
    return load_config("smollm2-roles", [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()])


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_shipped_files_are_of_their_stage_and_leave_the_rest_to_the_config(path: Path) -> None:
    settings = read_deepspeed(path, config_of(), 2)
    assert f"zero{settings['zero_optimization']['stage']}" == path.stem
    done = complete(settings, size=2, parts=3, max_norm=7.0, widest=200_000)
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [done[key] for key in sizes] == [6, 1, 3]
    assert done["gradient_clipping"] == (7.0 if path.stem != "zero0" else 0.0)
    if path.stem == "zero3":
        assert done["zero_optimization"]["stage3_param_persistence_threshold"] == 200_000


def test_there_is_a_file_for_each_stage() -> None:
    assert [path.stem for path in JSONS] == ["zero0", "zero1", "zero2", "zero3"]


def test_what_agrees_with_the_config_is_taken(tmp_path: Path) -> None:
    settings = {
        "train_batch_size": 44, "train_micro_batch_size_per_gpu": 11, "gradient_accumulation_steps": 2,
        "gradient_clipping": 1000, "bf16": {"enabled": True}, "fp16": {"enabled": "auto"}, "steps_per_print": 5,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    }  # fmt: skip
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    found = read_deepspeed(path, config_of(train__gradient_accumulation_steps=2, model__dtype="bfloat16"), 2)
    assert found == {"steps_per_print": 5, "zero_optimization": {"stage": 2}}
    assert "bf16" not in complete(found, 2, 2, 1.0, 8)  # the operators stay float32


REFUSED: dict[str, tuple[Any, str]] = {
    "batch": ({"train_batch_size": 64}, r"train_batch_size is 64, but the config says 44 \(train.ambiguous \+ train"),
    "micro": ({"train_micro_batch_size_per_gpu": 44}, "train_micro_batch_size_per_gpu is 44, but the config says 22"),
    "parts": ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4, but the config says 1"),
    "clip": ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but the config says 1000.0"),
    "bf16": ({"bf16": {"enabled": True}}, "bf16 is switched on, but model.dtype is float32; make them agree"),
    "no object": ({"bf16": True}, "bf16: expected an object, found bool"),
    "fp16": ({"fp16": {"enabled": True}}, "fp16 is switched on, but model.dtype is float32"),
    "optimizer": ({"optimizer": {"type": "Adam"}}, "optimizer: the optimiser is set by train.optimizer"),
    "scheduler": ({"scheduler": {}}, "scheduler: the learning rate is set by train.optimizer.l"),
    "stage": ({"zero_optimization": {"stage": 4}}, r"zero_optimization.stage must be one of \(0, 1, 2, 3\)"),
    "truth": ({"zero_optimization": {"stage": True}}, r"stage must be one of \(0, 1, 2, 3\), found true"),
    "misspelt": (
        {"zero_optimization": {"overlap_com": True}},
        "overlap_com: DeepSpeed has no such key; did you mean",
    ),
    "offload": ({"zero_optimization": {"stage": 2, "offload_optimizer": {}}}, "offload_optimizer: .* remove it"),
    "unknown": ({"zero_optimisation": {}}, "zero_optimisation: not used here; remove it"),
    "list": ([1], "expected a JSON object, found list"),
}


def test_the_keys_of_zero_are_those_that_deepspeed_has() -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    fields = zero.DeepSpeedZeroConfig.model_fields
    assert {field.alias or name for name, field in fields.items()} == ZERO


def test_free_form_runs_read_the_same_file_by_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    config = load_config("smollm2-roles-freeform", ["model.dtype=bfloat16"])
    settings = {"bf16": {"enabled": True}, "train_batch_size": 224, "zero_optimization": {"stage": 0}}  # 56 x 4 answers
    path.write_text(json.dumps(settings), encoding="utf-8")
    assert read_deepspeed(path, config, 2) == {"zero_optimization": {"stage": 0}}
    for wrong, message in (
        ({"train_batch_size": 56}, "train_batch_size is 56, but the config says 224"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2, expected 0"),
        ({"zero_optimization": {"stage": True}}, "found true"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean overlap_comm"),
    ):
        path.write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(LaunchError, match=message):
            read_deepspeed(path, config, 2)


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_contradicts_the_config_is_refused(name: str, tmp_path: Path) -> None:
    settings, message = REFUSED[name]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(LaunchError, match=message) as raised:
        read_deepspeed(path, config_of(), 2)
    assert str(raised.value).startswith(f"{path}: ")


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="nothing.json: cannot be read: No such file"):
        read_deepspeed(tmp_path / "nothing.json", config_of(), 2)
    (tmp_path / "ds.json").write_text("{", encoding="utf-8")
    with pytest.raises(LaunchError, match="ds.json: not valid JSON"):
        read_deepspeed(tmp_path / "ds.json", config_of(), 2)


def test_more_processes_than_decisions_are_refused(tmp_path: Path) -> None:
    few = config_of(train__ambiguous=6, train__unambiguous=2)
    assert read_deepspeed(JSONS[0], few, 8)
    with pytest.raises(LaunchError, match="a step has 8 decisions, too few to divide among 9 processes; start fewer"):
        read_deepspeed(JSONS[0], few, 9)
    parts = config_of(train__ambiguous=6, train__unambiguous=2, train__gradient_accumulation_steps=3)
    with pytest.raises(LaunchError, match="too few to divide among 4 processes x 3 parts"):
        read_deepspeed(JSONS[0], parts, 4)


# What ends all processes alike


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As a launcher starts the second of two processes; it never waits."""
    monkeypatch.setattr(cli, "PATIENCE", 0.0)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_processes_that_were_not_told_of_each_other_are_refused(launched: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match="a launcher started 2 processes, but without --deepspeed FILE each would"):
        open_world(config_of(), None)
    launched.setenv("WORLD_SIZE", "two")
    with pytest.raises(LaunchError, match="WORLD_SIZE is 'two', expected the number of processes"):
        open_world(config_of(), None)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("size", "settings", "message"),
    [
        (
            "2",
            '{"train_batch_size": 3}',
            "{path}: train_batch_size is 3, but the config says 20 (train.ambiguous + train.unambiguous); "
            "make them agree",
        ),
        (
            "21",
            "{}",
            "a step has 20 decisions, too few to divide among 21 processes; start fewer processes, "
            "or raise train.ambiguous",
        ),
    ],
    ids=["contradiction", "more processes than decisions"],
)
def test_bad_input_ends_every_process_before_they_meet(
    rank: str,
    size: str,
    settings: str,
    message: str,
    launched: pytest.MonkeyPatch,
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launched.setenv("RANK", rank)
    launched.setenv("WORLD_SIZE", size)
    config = write_config(tmp_path, model_folder)
    path = tmp_path / "ds.json"
    path.write_text(settings, encoding="utf-8")
    assert cli.main(["train", str(config), "--deepspeed", str(path)]) == 2
    told = "dso: " if rank == "0" else "dso: process 1: "
    assert capsys.readouterr().err == f"{told}{message.format(path=path)}\n"
    assert not (tmp_path / "runs").exists()


def test_processes_without_a_gpu_of_their_own_are_refused(launched: pytest.MonkeyPatch) -> None:
    launched.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        launched.delenv(name, raising=False)
    with pytest.raises(
        LaunchError, match="process 1 of this machine has no GPU: it sees 1; start as many processes as"
    ):
        open_world(config_of(model__device="cuda"), str(JSONS[0]))
    with pytest.raises(LaunchError, match="model.device is 'meta'; processes of a launcher take 'cuda' or 'cpu'"):
        open_world(config_of(model__device="meta"), str(JSONS[0]))


@pytest.mark.parametrize(
    ("place", "visible", "of_job", "shown", "gpu"),
    [
        (3, 4, "4", None, 3),  # Slurm shows each task all
        (3, 1, "4", "0", 0),  # --gpus-per-task=1: each its own, by a number that begins anew
        (3, 1, "4", "3", 0),
        (3, 1, None, "3", 0),  # another scheduler, or a line of the user's own
        (3, 1, "1", "0", None),  # four tasks and one GPU
        (1, 1, None, "0", None),
        (1, 1, None, None, None),
        (4, 2, "4", None, None),
    ],
)
def test_a_task_that_sees_one_gpu_takes_it(
    place: int, visible: int, of_job: str | None, shown: str | None, gpu: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"LOCAL_RANK": str(place), "SLURM_GPUS_ON_NODE": of_job, "CUDA_VISIBLE_DEVICES": shown}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    if gpu is None:
        with pytest.raises(LaunchError, match=f"process {place} of this machine has no GPU: it sees {visible}"):
            process_device("cuda")
        return
    assert process_device("cuda") == torch.device("cuda", gpu) == taken[0]


PAIR = """
import sys, time, torch
import torch.distributed as dist
from dso.errors import UserError
from trainers.parallel.ranks import RankLost, Ranks
what = sys.argv[3]
if what == "gpu":  # nothing may go over what DeepSpeed's exchanges go over there
    join = dist.init_process_group
    dist.init_process_group = lambda backend, **options: join({"nccl": "gloo"}[backend], **options)
world = Ranks(torch.device("cuda" if what == "gpu" else "cpu"), timeout=float(sys.argv[1]))
if what == "gpu":
    for name in ("all_reduce", "broadcast_object_list", "all_gather_object"):
        def checked(*arguments, exchange=getattr(dist, name), **options):
            assert options["group"] is world._group is not None
            return exchange(*arguments, **options)
        setattr(dist, name, checked)
other = 1 - world.rank
assert world.all_sum(torch.tensor([1.0, world.rank])).tolist() == [2.0, 1.0]
assert (world.most(world.rank), world.agree(world.rank == 1), world.agree(False)) == (1, True, False)
assert world.broadcast_object(["first", "second"][world.rank]) == "first"
world.require(None)
try:
    world.require(UserError("no disk") if world.rank == 1 else None)
except UserError as error:
    assert str(error) == ("no disk" if world.rank == 1 else "process 1: no disk"), error
if world.rank == 1:
    time.sleep(float(sys.argv[2]))
    sys.exit(7)
try:
    if what == "group":
        with world.groups_in_time():
            world.guard(lambda: torch.distributed.new_group([0, 1]))
    elif what == "meet":
        world.meet(lambda: print("they met"))
    else:
        world.barrier()
except RankLost as error:
    print(error)
"""


def pair(port: int, timeout: float, sleep: float, what: str) -> list[str]:
    """What each of two processes prints, the second of which goes away or sleeps."""
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR, str(timeout), str(sleep), what],
            cwd=ROOT,
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        for rank in (0, 1)
    ]
    try:
        first = started[0].communicate(timeout=300)[0]
    finally:
        started[1].kill()
    return [first, started[1].communicate()[0]]


@pytest.mark.parametrize(
    ("timeout", "sleep", "what"),
    [(200.0, 0.0, "barrier"), (15.0, 600.0, "gpu"), (15.0, 0.0, "group"), (15.0, 600.0, "meet")],
    ids=["gone", "asleep, on a GPU", "gone before a group is made", "asleep before DeepSpeed's exchange"],
)
def test_who_waits_for_a_process_that_does_not_come_says_so(timeout: float, sleep: float, what: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = pair(port, timeout, sleep, what)
    wanted = f"process 0: another process of the job ended, or did not answer within {timeout:g} s; its own message"
    assert wanted in first, first + second  # torch may warn before
    assert "they met" not in first


def test_another_error_is_not_taken_for_a_lost_process() -> None:
    assert not _is_lost(RuntimeError("CUDA out of memory"))
    assert _is_lost(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))


# The benchmark


def test_exchanges_are_counted_once_by_what_a_process_hands_over() -> None:
    exchanges = Exchanges()
    handles = []

    def gather(out: torch.Tensor, own: torch.Tensor, **_: object) -> SimpleNamespace:
        reduce(out)  # some exchanges are made of others
        handle = SimpleNamespace(wait=lambda: handles.append("waited"))
        return handle

    reduce = exchanges._wrapped("all_reduce", lambda tensor: None)
    gather = exchanges._wrapped("all_gather_into_tensor", gather)
    gather(torch.zeros(8), torch.zeros(4), async_op=True)
    reduce(torch.zeros(3, dtype=torch.float64))
    exchanges._wrapped("reduce_scatter", lambda *a: None)(torch.zeros(2), [torch.zeros(2), torch.zeros(2)])
    seconds, sizes = exchanges.reset()
    assert sizes == {"all_gather_into_tensor": 16, "all_reduce": 24, "reduce_scatter": 16}
    assert handles == ["waited"] and seconds > 0
    assert exchanges.reset() == (0.0, {})


def test_rounds_are_merged_by_their_median_step_and_largest_memory() -> None:
    rows = [
        {"decisions": 6, "seconds": [1.0, 2.0], "shares": [0.1, 0.2], "step_bytes": 5, "bytes": 40},
        {"decisions": 6, "seconds": [4.0], "shares": [0.6], "step_bytes": 7, "bytes": 40},
    ]
    found = merged(rows)
    assert (found["step_s"], found["decisions_per_s"], found["exchange_share"]) == (2.0, 3.0, 0.2)
    assert (found["step_bytes"], found["bytes"], found["seconds"]) == (7, 40, [1.0, 2.0, 4.0])


def test_one_process_is_measured(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXCHANGES:  # put back afterwards
        if hasattr(torch.distributed, name):
            monkeypatch.setattr(torch.distributed, name, getattr(torch.distributed, name))
    config = str(write_config(tmp_path, model_folder))
    work(Namespace(config=config, overrides=[], deepspeed=None, steps=2, out=str(tmp_path / "row.json")))
    row = json.loads((tmp_path / "row.json").read_text(encoding="utf-8"))
    assert (row["processes"], row["decisions"], row["bytes"], len(row["seconds"])) == (1, 20, 0, 2)
    # Float32: a and b of 5 norms of width 16; the model's weights; and of each coefficient itself, two moments, its
    # step size, beside what a state says of all else.
    assert row["gradient_bytes"] == 4 * 5 * 2 * 16
    assert row["model_bytes"] == 4 * sum(p.numel() for p in tiny_llama().parameters())
    assert row["state_bytes"] > 4 * row["gradient_bytes"] and row["steering_bytes"] > row["gradient_bytes"]
    assert "on disk: state" in table([merged([row | {"checkpointed": False}])])
