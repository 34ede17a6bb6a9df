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
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainers.distributed import Ranks
from trainers.learner import Learner
from trainers.policy import SteeringPolicy

T = TypeVar("T")


class EngineLearner(Learner):
    """The processes of a launcher, by a DeepSpeed engine.

    Args:
        policy, max_norm, parts: see :class:`trainers.learner.Learner`.
        world: the processes.
        settings: DeepSpeed's configuration; what the trainer decides itself is set here.
    """

    def __init__(self, policy: SteeringPolicy, max_norm: float, parts: int, world: Ranks, settings: dict[str, Any]):
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Else it compiles one in its first run on CPUs, and a run that was killed while it did leaves a lock for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.world = world
        self.stage = int(settings.get("zero_optimization", {}).get("stage", 0))
        self._whole = _Whole(policy, _InStep(policy.task.backbone.model, world) if self.stage == 3 else None)
        widest = max(p.numel() for p in policy.parameters())
        self.engine = world.guard(
            lambda: deepspeed.initialize(
                model=self._whole,
                optimizer=policy.optimizer,
                config=complete(settings, world.size, parts, max_norm, widest),
            )[0]
        )
        super().__init__(policy, max_norm, parts)

    def pass_through(self, work: Callable[[], T]) -> T:
        return self._run(self._whole, work)

    def forward(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return self._run(self.engine, work)

    def _run(self, through: Callable[[], T], work: Callable[[], T]) -> T:
        self._whole.work = work
        try:
            return self.world.guard(through)
        finally:
            self._whole.work = None

    def backward(self, loss: Tensor, *, first: bool, last: bool) -> None:
        # The engine takes the mean over the processes; what is wanted is the sum.
        self.world.guard(lambda: self.engine.backward(loss * self.world.size, scale_wrt_gas=False))
        if not last:
            self.engine.step()  # counts the part

    def step(self, *, usable: bool = True) -> tuple[float, bool]:
        if self.stage == 0:
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm))
            usable = usable and bool(torch.isfinite(torch.tensor(norm)))
        self.optimizer.hold = not usable
        self.world.guard(self.engine.step)
        self.optimizer.hold = False
        if self.stage > 0:
            # A norm that is not finite counts as an overflow there, and the step was left out in every process.
            norm = float(self.engine.optimizer._global_grad_norm)
            usable = usable and not self.engine.optimizer.overflow
        self._gather()
        return norm, usable

    def optimizer_state(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return super().optimizer_state()
        from deepspeed.utils import safe_get_full_optimizer_state

        states = list(self.optimizer.state.values())
        found: dict[str, Tensor] = {}
        for index, parameter in enumerate(self.parameters):
            for name in states[0]:
                if name == "step":
                    found[f"{index}/step"] = states[0]["step"].clone()
                elif name != "size":
                    full = self.world.guard(lambda p=parameter, n=name: safe_get_full_optimizer_state(p, n))
                    found[f"{index}/{name}"] = full.clone()
        return found

    def take_over(self) -> None:
        if self.stage > 0:
            self._gather()
            for parameter in self.parameters:
                self._set(parameter, parameter.detach(), None)
        if self.stage == 3:
            self._store()
        super().take_over()

    def close(self) -> None:
        self.engine.destroy()

    def _prime(self) -> None:
        """One step without a gradient: the state is made where the engine has put the parameters."""
        self._gather()
        self.optimizer.priming = True
        for part in range(self.parts):
            (nothing,) = self.forward(lambda: (sum(p.sum() * 0.0 for p in self.parameters),))
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
                self._set(self.parameters[index], value, name)

    def _set(self, parameter: Tensor, value: Tensor, name: str | None) -> None:
        """Set this process's slice of a parameter's entry in the optimiser's state, or of the parameter itself."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.stage == 3:  # DeepSpeed's own function for whole values leaves the padding of the last slice out
            size = parameter.ds_tensor.numel()
            padded = torch.nn.functional.pad(value.detach().flatten().to(parameter.device), (0, size * self.world.size))
            own = padded[size * self.world.rank : size * (self.world.rank + 1)]
            self.engine.optimizer.set_local_hp_param(own, parameter, name)
        elif name is None:
            safe_set_full_fp32_param(parameter, value.to(parameter.device))
        else:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)

    def _gather(self) -> None:
        """Stage 3: make the operators whole again where a step that was left out has not."""
        if self.stage == 3 and any(not p.numel() for p in self.parameters):
            self.parameters[0].all_gather(self.parameters)

    def _store(self) -> None:
        """Stage 3: the slices that operators are gathered from follow what was written into the whole ones."""
        for parameter in self.parameters:
            size = parameter.ds_tensor.numel()
            padded = torch.nn.functional.pad(parameter.detach().flatten(), (0, size * self.world.size))
            parameter.ds_tensor.data.copy_(padded[size * self.world.rank : size * (self.world.rank + 1)])


class _Whole(nn.Module):
    """All parameters under one roof, as the engine wants them; a pass is whatever ``work`` does with them."""

    def __init__(self, policy: SteeringPolicy, in_step: _InStep | None):
        super().__init__()
        self.backbone = policy.task.backbone.model
        self.steering = policy.steering
        self.value_head = policy.value_head
        self.work: Callable[[], Any] | None = None
        self._in_step = in_step

    def forward(self) -> Any:
        result = self.work()
        if self._in_step is None:
            return result
        nothing = self._in_step.finish()
        if not nothing.requires_grad:
            return result
        # Gradients go back through idle passes too, in every process alike.
        return (result[0] + nothing, *result[1:]) if isinstance(result, tuple) else result + nothing


class _InStep:
    """Passes through a model whose weights are divided: each takes all processes, as each has to send its part.

    Before a pass every process says that it has one. One that has no more says so, and as long as others have, it makes
    an idle pass for each of theirs: of one token, or of the last inputs where there was more to them than tokens.

    Args:
        model: the backbone.
        world: the processes.
    """

    PLAIN = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}

    def __init__(self, model: nn.Module, world: Ranks):
        self._model = model
        self._world = world
        self._idle = False
        self._last: dict[str, Any] = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, model: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        if not self._idle:
            self._last = inputs
            self._world.most(1)

    def finish(self) -> Tensor:
        """Idle passes until nobody has another one; a zero that hangs on them."""
        nothing = torch.zeros(())
        self._idle = True
        try:
            while self._world.most(0):
                inputs = self._last
                if set(inputs) <= self.PLAIN:
                    inputs = {"input_ids": inputs["input_ids"][:, :1].to(self._world.device), "use_cache": False}
                nothing = nothing + 0.0 * self._model(**inputs).logits[..., 0].float().sum()
        finally:
            self._idle = False
        return nothing


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
