"""A DeepSpeed engine as the learner: ZeRO over the frozen backbone, the operators as the trainable parameters.

Whatever the stage, the engine owns the gradients' reduction, the clipping and the call of the optimiser's ``step``:

    0, 1, 2    every process has the whole backbone; from 1 on the operators' moments, from 2 on their gradients, are
               divided among the processes (megabytes: what these stages save is small, as the backbone has neither)
    3          the backbone's weights are divided too, and each layer's are gathered for its passes

The step itself is elementwise and inside the optimiser (:mod:`trainers.optimizer`), so it is right on any division.
Operators are float32 beside a backbone of any dtype: neither bf16 nor fp16 of DeepSpeed is switched on, as both cast
every parameter. Under stage 3 operators stay whole in each process (their gradients and moments do not), so that
reading them, as validation and checkpoints do, needs no exchange.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainers.learner import Learner
from trainers.parallel.lockstep import InStep, Kept, Whole
from trainers.parallel.ranks import World
from trainers.policy import SteeringPolicy

T = TypeVar("T")


def import_deepspeed() -> ModuleType:
    """DeepSpeed, quiet and without what it would compile."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls exchanges by names that torch is about to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Else it compiles one in its first run on CPUs, and a run that was killed while it did leaves a lock for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class EngineLearner(Learner):
    """The processes of a launcher, by a DeepSpeed engine.

    Args:
        policy, max_norm, parts: see :class:`trainers.learner.Learner`.
        world: the processes.
        settings: DeepSpeed's configuration; what the trainer decides itself is set here.
    """

    shared = True
    world: World

    def __init__(self, policy: SteeringPolicy, max_norm: float, parts: int, world: World, settings: dict[str, Any]):
        deepspeed = import_deepspeed()
        self.world = world
        self.stage = int(settings.get("zero_optimization", {}).get("stage", 0))
        in_step = InStep(policy.task.backbone.model, world) if self.stage == 3 else None
        self._whole = Whole(policy, in_step)
        policy.task.world = in_step or world
        widest = max(p.numel() for p in policy.parameters())
        # Its default are buffers of 2 GB, and deterministic mode fills them anew in every step.
        bucket = {"reduce_bucket_size": sum(p.numel() for p in policy.parameters())}
        settings = settings | {"zero_optimization": bucket | settings.get("zero_optimization", {})}
        with world.groups_in_time():
            self.engine = world.guard(
                lambda: deepspeed.initialize(
                    model=self._whole,
                    optimizer=policy.optimizer,
                    config=complete(settings, world.size, parts, max_norm, widest),
                )[0]
            )
        self._kept = Kept(self.engine.optimizer.parameter_offload) if self.stage == 3 else None
        super().__init__(policy, max_norm, parts)

    def pass_through(self, work: Callable[[], T]) -> T:
        box: list[T] = []

        def fill() -> None:  # stage 3 looks into what a module returns, and takes tensors only
            box.append(self._whole.in_step(work))

        self._run(self._whole, fill)
        return box[0]

    def forward(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return self._run(self.engine, lambda: self._whole.in_step(work))

    def _run(self, through: Callable[[], T], work: Callable[[], T]) -> T:
        self._whole.work = work
        try:
            return self.world.guard(through)
        finally:
            del self._whole.work

    def backward(self, loss: Tensor, *, first: bool, last: bool) -> None:
        # The engine takes the mean over the processes; what is wanted is the sum.
        self.world.meet(lambda: self.engine.backward(loss * self.world.size, scale_wrt_gas=False))
        if not last:
            self.engine.step()  # counts the part

    def step(self, *, usable: bool = True) -> tuple[float, bool]:
        if self.stage == 0:
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm))
            usable = usable and bool(torch.isfinite(torch.tensor(norm)))
        self.optimizer.hold = not usable
        self.world.meet(self.engine.step)
        self.optimizer.hold = False
        if self.stage > 0:
            # A norm that is not finite counts as an overflow there, and the step was left out in every process.
            norm = float(self.engine.optimizer._global_grad_norm)
            usable = usable and not self.engine.optimizer.overflow
        self._hold()
        return norm, usable

    def optimizer_state(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return super().optimizer_state()
        first = next(iter(self.optimizer.state.values()))
        found: dict[str, Tensor] = {}
        for name, value in first.items():
            if name == "step":  # one for all parameters
                found |= {f"{index}/step": value.clone() for index in range(len(self.parameters))}
            elif name != "size":
                found |= {f"{index}/{name}": whole for index, whole in enumerate(self._whole_entries(name))}
        return found

    def take_over(self) -> None:
        if self.stage > 0:
            self._hold()
            for parameter in self.parameters:
                self._put(parameter, parameter, None)
        if self.stage == 3:
            self._store()
        super().take_over()

    def close(self) -> None:
        self.engine.destroy()

    def _prime(self) -> None:
        """One step without a gradient: the state is made where the engine has put the parameters."""
        self._hold()
        self.optimizer.priming = True
        for part in range(self.parts):
            (nothing,) = self.forward(lambda: (sum((p.sum() * 0.0 for p in self.parameters), torch.zeros(())),))
            self.backward(nothing, first=part == 0, last=part == self.parts - 1)
        self.step()
        self.optimizer.priming = False

    def _fill(self, name: str, values: dict[int, Tensor]) -> None:
        if self.stage == 0:
            super()._fill(name, values)
        elif name == "step":  # one for all parameters
            for state in self.optimizer.state.values():
                state["step"].copy_(next(iter(values.values())))
        else:
            for index, value in values.items():
                self._put(self.parameters[index], value, name)

    def _own(self, parameter: Any, name: str | None) -> tuple[Tensor, int]:
        """This process's slice of an entry of the optimiser's state, or of the float32 parameter itself; where it is.

        Returns:
            (n,) the slice, a view; and its start in the flat parameter, beyond whose end stage 3 pads the last one.
        """
        if self.stage == 3:
            own = self.engine.optimizer._get_fp32_opt_state_partition(parameter, False, name)[0].detach()
            return own, self.world.rank * own.numel()
        if (mapping := parameter._hp_mapping) is None:
            return torch.empty(0), 0
        flat = self.optimizer.param_groups[mapping.param_group_index]["params"][0]
        entry = flat.detach() if name is None else self.optimizer.state[flat][name]
        place = mapping.hp_fragment_address
        return entry.narrow(0, place.start, place.numel), mapping.lp_fragment_address.start

    def _put(self, parameter: Tensor, value: Tensor, name: str | None) -> None:
        own, start = self._own(parameter, name)
        part = value.detach().flatten()[start : start + own.numel()]
        own[: part.numel()].copy_(part)

    def _whole_entries(self, name: str) -> list[Tensor]:
        """An entry of the optimiser's state for each parameter, put together from all processes in one exchange."""
        sizes = [parameter.numel() for parameter in self.parameters]
        flat = torch.zeros(sum(sizes), device=self.parameters[0].device)
        for parameter, whole in zip(self.parameters, flat.split(sizes), strict=True):
            own, start = self._own(parameter, name)
            part = whole[start : start + own.numel()]
            part.copy_(own[: part.numel()])
        entries = self.world.all_sum(flat).split(sizes)
        return [entry.view(p.shape).clone() for entry, p in zip(entries, self.parameters, strict=True)]

    def _hold(self) -> None:
        """Stage 3: make whole again what a step divides and passes need at once."""
        if self._kept:
            self.world.meet(self._kept.hold)

    def _store(self) -> None:
        """Stage 3: the slices that operators are gathered from follow what was written into the whole ones."""
        parameter: Any  # DeepSpeed has made more than a tensor of each
        for parameter in self.parameters:
            size = parameter.ds_tensor.numel()
            padded = torch.nn.functional.pad(parameter.detach().flatten(), (0, size * self.world.size))
            parameter.ds_tensor.data.copy_(padded[size * self.world.rank : size * (self.world.rank + 1)])


def complete(settings: dict[str, Any], size: int, parts: int, max_norm: float, widest: int) -> dict[str, Any]:
    """DeepSpeed's configuration with what the trainer decides.

    Batches are counted in parts of a step, as decisions are not divided evenly: blocks of them stay together.
    """
    zero = dict(settings.get("zero_optimization", {}))
    stage = int(zero.get("stage", 0))
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = max(
            int(zero.get("stage3_param_persistence_threshold", 100_000)), widest
        )
    ours = {
        "train_batch_size": size * parts,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": max_norm if stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }
    kept = {key: value for key, value in settings.items() if key not in ("bf16", "fp16")}
    return {"wall_clock_breakdown": False, **kept, **ours}
