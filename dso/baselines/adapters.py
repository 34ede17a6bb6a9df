"""PEFT's LoRA and LN tuning, trained on the objective of ours (:func:`dso.baselines.learning.regression`).

Decisions, wanted policy, loss, price of KL and wall clock are the same, so what is compared is what is trained:

    LoRA        W' = W + s (alpha / r) B A          Hu et al. 2022 (arXiv 2106.09685), section 4.1
    LN tuning   w' = w + s (w_1 - w)                Zhao et al. 2024 (arXiv 2312.11420), section 2; norms' weights

s is PEFT's scaling of a LoRA layer. PEFT has none for norms, so their weights are interpolated. LN tuning of norms
without offsets is the operator ``scale`` in other coordinates, w_1 = w (1 + a).

The layers are PEFT's own code, put into the model as a candidate is attached and taken out as it is detached: its
modules are then those that it had before. At scale 0 PEFT hands on what the base layer gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dso.baselines.baseline import Baseline, BaselineError, Candidate, Task
from dso.baselines.learning import Setting, learn, regression, seconds_each
from dso.errors import first_line
from dso.steering.hosts import unwrapped
from dso.steering.sites import resolve_sites

NAME = "default"  # what PEFT calls an only adapter
RANK = 8
# Learning rates at which SmolLM2-135M does not overshoot in a few dozen steps; scales make up for too few of them.
LORA_RATE, NORM_RATE = 5e-4, 6e-4
SCALES = (1.0, 2.0, 3.0)


class Adapter:
    """An adapter of PEFT that can be attached with a scale.

    Args:
        kind: ``lora`` or ``ln_tuning``.
        options: of PEFT's config of that kind.

    Attributes:
        tensors: the trained weights, by their names in the model that has them; None until they are trained.
    """

    def __init__(self, kind: str, **options: Any):
        self.kind = kind
        self.options = options
        self.tensors: dict[str, Tensor] | None = None

    def attach(self, model: nn.Module, scale: float = 1.0) -> AdapterHandle:
        """Put PEFT's layers into a model; those of an adapter that is not trained yet take gradients.

        Raises:
            BaselineError: if PEFT is not installed, finds no layer to adapt, or has an adapter on the model already.
        """
        return AdapterHandle(self, unwrapped(model), scale)


class AdapterHandle:
    """PEFT's layers in a model.

    Args:
        adapter: whose weights they have.
        model: that gets them.
        scale: see :attr:`scale`.
    """

    def __init__(self, adapter: Adapter, model: Any, scale: float):
        if hasattr(model, "peft_config"):
            raise BaselineError("the model has an adapter of PEFT already; take it off first (its handle's detach())")
        tuner, config = _classes(adapter.kind)
        try:
            with warnings.catch_warnings():
                # LN tuning copies a layer, whatever its type; PEFT warns that it does not know RMSNorm's sizes.
                warnings.filterwarnings("ignore", "Unsupported layer type")
                self._tuner = tuner(model, config(**adapter.options), NAME)
        except ValueError as error:
            raise BaselineError(f"PEFT's {adapter.kind} has no place in this model: {first_line(error)}") from error
        self._layers: list[Any] = [m for m in model.modules() if isinstance(m, tuner.tuner_layer_cls)]
        self._own = {n: p for n, p in model.named_parameters() if f".{tuner.prefix}" in n}
        self._base = {n: model.get_parameter(_base_name(n)) for n in self._own if adapter.kind == "ln_tuning"}
        self._trained = adapter.tensors
        with torch.no_grad():
            for name, value in (self._trained or {}).items():
                self._own[name].copy_(value)
        self.scale = scale

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return list(self._own.values())

    def tensors(self) -> dict[str, Tensor]:
        """A copy of the weights by name."""
        return {name: value.detach().clone() for name, value in self._own.items()}

    @property
    def scale(self) -> float | Tensor:
        """The coefficient s; 0 is the base model."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = value
        for layer in self._layers:
            layer.enable_adapters(bool(value))
            if not self._base:
                layer.set_scale(NAME, value)
        if self._trained is None:
            return
        with torch.no_grad():
            for name, base in self._base.items():
                self._own[name].copy_(torch.lerp(base, self._trained[name], float(value)))
        for parameter in self._own.values():  # PEFT has them trained whenever its layers are enabled
            parameter.requires_grad_(False)

    def detach(self) -> None:
        """Take the layers out; doing it twice is harmless."""
        if self._layers:
            self._tuner.unload()
            self._layers = []


def _base_name(name: str) -> str:
    """``<norm>.base_layer.weight`` of ``<norm>.ln_tuning_layers.default.weight``."""
    return name.replace(f"ln_tuning_layers.{NAME}.", "base_layer.")


def _classes(kind: str) -> tuple[Any, Any]:
    try:
        from peft import LNTuningConfig, LoraConfig
        from peft.tuners.ln_tuning import LNTuningModel
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise BaselineError(f"{kind} is PEFT's: pip install 'dso[baselines]' ({first_line(error)})") from error
    return {"lora": (LoraModel, LoraConfig), "ln_tuning": (LNTuningModel, LNTuningConfig)}[kind]


def train(task: Task, adapter: Adapter, setting: Setting) -> Adapter:
    """Train an adapter on the task's decisions; the model is left as it was."""
    own = [task.backbone.device] if task.backbone.device.type == "cuda" else []
    with torch.random.fork_rng(devices=own):
        torch.manual_seed(task.seed)  # of the rows of A
        handle = adapter.attach(task.backbone.model)
    try:
        learn(task, handle, handle.parameters, regression(task), setting)
        adapter.tensors = handle.tensors()
    finally:
        handle.detach()
    return adapter


def _propose_lora(task: Task) -> Iterator[Candidate]:
    adapter = Adapter("lora", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    setting = Setting(rate=LORA_RATE, seconds=seconds_each(task, 1))
    yield Candidate(f"rank {RANK}, all linear layers", train(task, adapter, setting))


def _propose_norms(task: Task) -> Iterator[Candidate]:
    norms = list(resolve_sites(unwrapped(task.backbone.model)))
    setting = Setting(rate=NORM_RATE, seconds=seconds_each(task, 1))
    yield Candidate(f"{len(norms)} norms", train(task, Adapter("ln_tuning", target_modules=norms), setting))


LORA = Baseline(
    name="lora",
    title="LoRA (PEFT)",
    source="Hu et al. 2022 (arXiv 2106.09685), section 4.1",
    propose=_propose_lora,
    scales=SCALES,
)
LN_TUNING = Baseline(
    name="ln-tuning",
    title="LN tuning (PEFT)",
    source="Zhao et al. 2024 (arXiv 2312.11420), section 2",
    propose=_propose_norms,
    scales=SCALES,
)
