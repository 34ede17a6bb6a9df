"""The processes of a run: whether a launcher started this one, and what DeepSpeed is told.

A run of one process needs neither. Where a launcher started several (it says so in ``RANK`` and ``WORLD_SIZE``),
``--deepspeed FILE`` gives DeepSpeed's configuration. The config of the run stays what the run is: a file that says
otherwise is refused, ``"auto"`` is taken from the config, and what it does not say is decided here.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from dso.errors import UserError
from launch.config.reading import nearest
from launch.config.schema import TrainConfig
from launch.run.constants import MAX_GRAD_NORM
from trainers.answers import divide
from trainers.parallel.ranks import Ranks, World

STAGES = (0, 1, 2, 3)
# What is passed on to DeepSpeed as it stands.
PASSED_ON = {
    "zero_optimization", "aio", "communication_data_type", "comms_logger", "dump_state", "flops_profiler",
    "memory_breakdown", "prescale_gradients", "steps_per_print", "wall_clock_breakdown",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
}  # fmt: skip
REFUSED = {
    "optimizer": "the optimiser is set by train.optimizer",
    "scheduler": "the learning rate is set by train.optimizer.learning_rate",
    "amp": "the precision is set by model.dtype",
    "activation_checkpointing": "set train.gradient_checkpointing",
}


# What DeepSpeed 0.19 knows of zero_optimization; what it does not know it would pass over.
ZERO = {
    "allgather_bucket_size", "allgather_partitions", "compute_grad_norm", "contiguous_gradients", "cpu_offload",
    "cpu_offload_param", "cpu_offload_use_pin_memory", "elastic_checkpoint", "enable_sanity_checks",
    "ignore_unused_parameters", "leaf_module", "legacy_stage1", "load_from_fp32_weights",
    "log_trace_cache_warnings", "memory_efficient_linear", "offload_optimizer", "offload_param", "overlap_comm",
    "override_module_apply", "parameter_alignment", "pipeline_loading_checkpoint", "reduce_bucket_size",
    "reduce_scatter", "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "stage",
    "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold", "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size", "use_multi_rank_bucket_allreduce", "zenflow", "zero_hpz_partition_size",
    "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights",
}  # fmt: skip


class LaunchError(UserError):
    """A launch that contradicts the config, or lacks something; the message names the file and the key."""


def open_world(config: TrainConfig, deepspeed: str | None) -> tuple[World, dict[str, Any] | None]:
    """The processes of a run, and DeepSpeed's configuration where there is one.

    Free-form answers are learned from by transformers' trainer: it needs DeepSpeed for no number of processes, and
    takes its configuration with what it fills in from its own arguments.

    Args:
        deepspeed: path of a JSON file; None for none.

    Raises:
        UserError: in every process alike, before they meet.
    """
    size = process_count()
    if config.freeform:
        divide(config.decisions, config.train.freeform.num_generations, size, micro_batch(config, size))
    elif deepspeed is None and size > 1:
        reason = f"a launcher started {size} processes, but without --deepspeed FILE each would train by itself"
        raise LaunchError(f"{reason}; give a file, such as configs/deepspeed/zero2.json")
    settings = None
    if deepspeed is not None:
        settings = read_deepspeed(deepspeed, config, size)
        if importlib.util.find_spec("deepspeed") is None:
            extras = "train,grpo,distributed" if config.freeform else "train,distributed"
            raise LaunchError(f"--deepspeed needs DeepSpeed: pip install 'dso[{extras}]'")
    if settings is not None and config.freeform:
        divided = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
        filled = dict.fromkeys((*divided, "gradient_clipping"), "auto")
        settings = {**settings, **filled, "zero_allow_untested_optimizer": True}
        _prepare_deepspeed()
    if size == 1 and (settings is None or config.freeform):
        return World(), settings
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    return Ranks(process_device(config.model.device), config.run.ddp_timeout), settings


def _prepare_deepspeed() -> None:
    """Import it before transformers does, which would let it look for an accelerator."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from trainers.parallel.engine import import_deepspeed

    import_deepspeed()


def micro_batch(config: TrainConfig, size: int) -> int | None:
    """Free-form answers of one pass in one of ``size`` processes; None where each passes its whole share at once."""
    parts = config.train.gradient_accumulation_steps
    answers = config.decisions * config.train.freeform.num_generations
    return None if parts == 1 else max(1, answers // (size * parts))


def read_deepspeed(path: str | Path, config: TrainConfig, size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a run of ``size`` processes, of either kind, without what the config says.

    Raises:
        LaunchError: if the file cannot be read, or contradicts the config.
    """
    settings = read_json(path)
    for key in settings:
        if key in REFUSED:
            raise LaunchError(f"{path}: {key}: {REFUSED[key]}; remove it")
    _require_same(path, settings, _said(config, size))
    _require_precision(path, settings, config.model.dtype)
    zero = read_section(path, settings, "zero_optimization")
    _require_zero(path, zero, config.freeform)
    known = PASSED_ON | set(_said(config, size)) | {"bf16", "fp16"}
    if unknown := sorted(set(settings) - known):
        raise LaunchError(f"{path}: {unknown[0]}: not used here; remove it (used are {', '.join(sorted(known))})")
    if not config.freeform:
        _require_enough(config, size)
    kept = {key: value for key, value in settings.items() if key in PASSED_ON and value != "auto"}
    return kept | {"zero_optimization": {key: value for key, value in zero.items() if value != "auto"}}


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        LaunchError: if the file cannot be read, or holds something else.
    """
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise LaunchError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise LaunchError(f"{path}: expected a JSON object, found {type(settings).__name__}")
    return settings


def read_section(path: str | Path, settings: dict[str, Any], key: str) -> dict[str, Any]:
    """A section of DeepSpeed's configuration, empty if it is not there.

    Raises:
        LaunchError: if it is no object.
    """
    section = settings.get(key, {})
    if not isinstance(section, dict):
        raise LaunchError(f"{path}: {key}: expected an object, found {type(section).__name__}")
    return section


def _require_zero(path: str | Path, zero: dict[str, Any], freeform: bool) -> None:
    """What may stand in ``zero_optimization``."""
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in STAGES:
        raise LaunchError(f"{path}: zero_optimization.stage must be one of {STAGES}, found {json.dumps(stage)}")
    if freeform and stage:
        reason = "free-form answers are sampled from whole weights, and what is trained is too small to divide"
        raise LaunchError(f"{path}: zero_optimization.stage is {stage}, expected 0: {reason}")
    if "offload_optimizer" in zero:
        gain = "the operators' moments are megabytes, so there is nothing to gain"
        raise LaunchError(f"{path}: zero_optimization.offload_optimizer: {gain}; remove it")
    if unknown := sorted(set(zero) - ZERO):
        guess = nearest(unknown[0], sorted(ZERO))
        hint = f"did you mean {guess}?" if guess else "remove it"
        raise LaunchError(f"{path}: zero_optimization.{unknown[0]}: DeepSpeed has no such key; {hint}")


def _said(config: TrainConfig, size: int) -> dict[str, tuple[object, str]]:
    """What the config says of DeepSpeed's keys, and where."""
    parts, what = config.train.gradient_accumulation_steps, "train.ambiguous + train.unambiguous"
    batch = config.decisions
    if config.freeform:
        batch, what = batch * config.train.freeform.num_generations, f"({what}) x train.freeform.num_generations"
    share = batch / (size * parts)
    divided = f"{what}, over {size} processes x train.gradient_accumulation_steps"
    return {
        "train_batch_size": (batch, what),
        "train_micro_batch_size_per_gpu": (int(share) if share.is_integer() else round(share, 2), divided),
        "gradient_accumulation_steps": (parts, "train.gradient_accumulation_steps"),
        "gradient_clipping": (MAX_GRAD_NORM, "launch/run/constants.py"),
    }


def _require_same(path: str | Path, settings: dict[str, Any], said: dict[str, tuple[object, str]]) -> None:
    for key, (value, where) in said.items():
        found = settings.get(key, "auto")
        if found != "auto" and found != value:
            raise LaunchError(f"{path}: {key} is {found}, but the config says {value} ({where}); make them agree")


def _require_precision(path: str | Path, settings: dict[str, Any], dtype: str) -> None:
    for key, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        enabled = read_section(path, settings, key).get("enabled", "auto")
        if enabled not in ("auto", dtype == name):
            switched = "on" if enabled else "off"
            raise LaunchError(f"{path}: {key} is switched {switched}, but model.dtype is {dtype}; make them agree")


def _require_enough(config: TrainConfig, size: int) -> None:
    parts = config.train.gradient_accumulation_steps
    if config.decisions < size * parts:
        shares = f"{size} processes" + (f" x {parts} parts" if parts > 1 else "")
        reason = f"a step has {config.decisions} decisions, too few to divide among {shares}"
        raise LaunchError(f"{reason}; start fewer processes, or raise train.ambiguous")


def process_count() -> int:
    """How many processes a launcher started; 1 without one.

    Raises:
        LaunchError: if it says something else than a number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise LaunchError(f"WORLD_SIZE is {text!r}, expected the number of processes that the launcher started")
    return int(text)


def leave(code: int) -> NoReturn:
    """End this process, which is done; one of several without taking the interpreter down.

    DeepSpeed holds on to groups after they are destroyed, and a thread of theirs that is left when the interpreter goes
    aborts the process now and then ("terminate called without an active exception"): a job that is done would fail.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":  # process_count() refuses nonsense, which was said already
        raise SystemExit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def process_device(wanted: str | None) -> torch.device:
    """The accelerator of this process; where it is a CPU, DeepSpeed is told so before it looks for itself.

    Args:
        wanted: ``model.device`` of the config.

    Raises:
        LaunchError: if there is no GPU for it, or the config asks for something else.
    """
    wanted = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda":
        device = torch.device("cuda", _gpu(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()))
        torch.cuda.set_device(device)
        return device
    if wanted != "cpu":
        raise LaunchError(f"model.device is {wanted!r}; processes of a launcher take 'cuda' or 'cpu'")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return torch.device("cpu")


def _gpu(place: int, visible: int) -> int:
    """Which of the visible GPUs is that of the process at a place on its machine.

    A scheduler that binds each task to a GPU shows it that one alone, whatever its place. Slurm says how many the job
    has on the machine, so that tasks without one are told apart; others set CUDA_VISIBLE_DEVICES to the task's own.
    """
    if place < visible:
        return place
    of_job = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    bound = of_job.isdecimal() and int(of_job) > place or os.environ.get("CUDA_VISIBLE_DEVICES") == str(place)
    if visible == 1 and bound:
        return 0
    raise LaunchError(
        f"process {place} of this machine has no GPU: it sees {visible}; start as many processes as there are GPUs"
    )
