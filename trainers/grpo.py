"""GRPO and RLOO on free-form answers, by TRL's trainers, with a steering as the only thing that is trained.

TRL 1.16 loads a reference model unless ``beta`` is 0 or the model is PEFT's, whose adapter it disables. A steering is
no adapter of PEFT's, and its reference is the same model at scale 0. So TRL is told that ``beta`` is 0, and afterwards
``beta`` is set to the price of the constraint and ``ref_model`` to a marker; the one method that computes
log-probabilities runs the model itself at scale 0 where it is given the marker. The formulas stay TRL's, with A the
advantage of an answer among those to its prompt, q = pi_0 / pi of a token and dr_grpo's normalisation (Liu et al. 2025,
arXiv 2503.20783):

    GRPO    sum_t ratio_t A - beta (q_t - log q_t - 1),    A = r - mean r
    RLOO    ratio A,    A = r' - mean of the others' r',   r' = r - beta sum_t log(1 / q_t)

Rewards are not divided by their standard deviation unless asked for: they vanish at parity, and dividing would blow up
what is left there.

Three more methods are replaced. Prompts are tokenised by the backbone (answers that are begun, no doubled special
tokens); answers are sampled by :mod:`dso.models.sampling`, which evaluation uses too; and the answers to one prompt
share its forward pass. Most of what is replaced is private to TRL, and a method that replaces nothing would never be
called: :func:`require_trl` refuses a TRL without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import trl
from accelerate.utils import broadcast
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.models import unwrap_model_for_generation

from dso.decisions.matching import Matcher
from dso.decisions.sampler import BlockSampler
from dso.errors import UserError
from dso.models.sampling import sample
from dso.steering.model import Steering
from envs.freeform import AnswerRewards
from envs.task import DecisionTask
from trainers.answers import answer_log_probs, divide, reward_weights
from trainers.constraints import FixedKL, KLBudget, sparsity
from trainers.fisher import fisher_diagonal, whitening
from trainers.optimizer import SteeringAdam
from trainers.parallel.ranks import World
from trainers.steps import AnswerSteps, Told

MODULE = "dso_steering"  # the steering's name in the model while it is trained
BASE = object()  # stands for the reference model: the same model at scale 0
_ARGUMENTS: dict[str, Any] = {
    "beta": 0.0,
    "activation_checkpointing": False,  # needs training mode, so dropout too: trainers.checkpointing does without
    "bf16": False,  # the operators are float32; the model has the dtype that it was loaded in
    "shuffle_dataset": False,  # the sampler's order is what keeps a block together
    "remove_unused_columns": False,
    "logging_steps": 1,  # the dual ascent takes what was logged since the last step
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "ddp_broadcast_buffers": False,
    "ddp_find_unused_parameters": False,
    "dataloader_pin_memory": False,
}
TRL_VERSIONS = ">=1.16,<1.17"  # that have what is replaced
REPLACED = (
    "_generate_single_turn",
    "_get_per_token_logps_and_entropies",
    "_prepare_inputs",
    "_tokenize_prompts",
    "create_optimizer",
    "create_scheduler",
)

if TYPE_CHECKING:

    class _TrainerOfTRL(Trainer):
        """What GRPOTrainer and RLOOTrainer have in common beyond transformers' trainer."""

        model: Any
        ref_model: Any
        _metrics: Any
        max_completion_length: Any
        temperature: float

        def __init__(self, *args: Any, **kwargs: Any): ...

        def _get_per_token_logps_and_entropies(
            self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...
else:
    _TrainerOfTRL = object


def require_trl(*trainers: type) -> None:
    """Refuse a TRL whose trainers do not have the methods that are replaced here.

    Args:
        trainers: of TRL; both where none is given.

    Raises:
        UserError: naming the method, and the versions that have it.
    """
    for trainer in trainers or (GRPOTrainer, RLOOTrainer):
        for name in REPLACED:
            if not hasattr(trainer, name):
                raise UserError(
                    f"TRL {trl.__version__} has no {trainer.__name__}.{name}, which training on free-form answers "
                    f"replaces; use a version that has it: pip install 'trl{TRL_VERSIONS}'"
                )


class SteeredAnswers(AnswerSteps, _TrainerOfTRL):
    """What GRPO and RLOO on a steering share; it comes before TRL's trainer among the bases.

    Args:
        task: decisions, backbone and rewards; the steering's handle is on its backbone.
        steering: what is learned.
        matcher: reads whom an answer names.
        kl: the constraint on the mean KL of a token, a :class:`KLBudget` or :class:`FixedKL`.
        rate: the learning rate as a function of the share of training that remains (1 to 0).
        steps: optimiser steps, each on answers sampled for it.
        ambiguous, unambiguous: decisions a step, over all processes.
        unambiguous_weight: weight of the unambiguous decisions' mean reward beside the ambiguous ones'.
        num_generations: answers a decision.
        micro_batch: answers of one forward and backward pass in one process; None for all of its answers of a step.
        betas, eps: of Adam.
        sparsity: lambda of the L1 penalty on the operators, taken as a proximal step.
        share_prompts: compute the answers to one prompt in one pass; without it TRL's own chunked head is used, which
            needs less memory where answers are long and the vocabulary is large.
        world: the processes, which a launcher started.
        seed: of batches and sampling.
        arguments: further fields of TRL's config: ``max_completion_length``, ``temperature``, ``max_grad_norm``,
            ``deepspeed``, ...

    Raises:
        UserError: if the answers of a step cannot be divided among the processes, or TRL is none that this works with.
    """

    CONFIG: Any
    DEFAULTS: dict[str, Any] = {}

    def __init__(
        self,
        task: DecisionTask,
        steering: Steering,
        matcher: Matcher,
        kl: KLBudget | FixedKL,
        rate: Callable[[float], float],
        *,
        steps: int,
        ambiguous: int,
        unambiguous: int = 0,
        unambiguous_weight: float = 1.0,
        num_generations: int = 8,
        micro_batch: int | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        sparsity: float = 0.0,
        share_prompts: bool = True,
        world: World | None = None,
        seed: int = 0,
        **arguments: Any,
    ):
        require_trl(type(self).__mro__[type(self).__mro__.index(AnswerSteps) + 1])
        model = task.backbone.model
        AnswerSteps.__init__(self, task, steering, kl, world)
        self.share_prompts = share_prompts
        self.answer_rewards = AnswerRewards(task, matcher)
        self._seed, self._counts = seed, (ambiguous, unambiguous)
        self._ids = {task.backbone.prompt_text(d): list(task.backbone.encode(d).prompt) for d in task.decisions}
        sampler = BlockSampler(task.decisions, ambiguous, unambiguous, seed)
        self._drawn = [sampler.draw().tolist() for _ in range(steps)]
        batch, portions = divide(sampler.size, num_generations, self.world.size, micro_batch)
        args = self.CONFIG(
            max_steps=steps,
            seed=seed,
            num_generations=num_generations,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=portions,
            learning_rate=rate(1.0),
            reward_weights=reward_weights(*sampler.counts, unambiguous_weight),
            use_cpu=task.backbone.device.type == "cpu",
            **{**_ARGUMENTS, **self.DEFAULTS, **arguments},
        )
        group = {"params": list(steering.parameters()), "penalty": sparsity}
        self.own_optimizer = SteeringAdam([group], lr=rate(1.0), betas=betas, eps=eps)
        self._rate = lambda step: rate(1 - (self.begun + step) / steps) / rate(1.0)
        self.own_optimizer.priming = True  # makes its state
        self.own_optimizer.step()
        self.own_optimizer.priming = False
        model.add_module(MODULE, steering.requires_grad_(True))
        super(AnswerSteps, self).__init__(
            model=model,
            reward_funcs=[self.answer_rewards.equiprobability, self.answer_rewards.correctness],
            args=args,
            train_dataset=self.rows(),
            processing_class=task.backbone.tokenizer,
            callbacks=[Told(self)],
            optimizers=(self.own_optimizer, None),
        )
        self.remove_callback(PrinterCallback)
        self.answer_rewards.gather = self.accelerator.gather
        self.beta, self.ref_model = kl.coefficient, BASE

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The optimiser of the steering: under DeepSpeed transformers asks for one, and has AdamW by itself."""
        self.optimizer = self.own_optimizer
        return self.own_optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """The schedule of the learning rate."""
        scheduler = LambdaLR(optimizer or self.own_optimizer, self._rate)
        self.lr_scheduler = scheduler
        return scheduler

    def release(self) -> None:
        """Leave the model as it was found, with the steering attached to it."""
        model = self.task.backbone.model
        delattr(model, MODULE)
        model.__dict__.pop("forward", None)  # TRL's, which reads the output layer without calling it
        model.eval()

    def rows(self) -> Dataset:
        """The decisions of the steps to do, in the order in which they are asked; prompts are rendered when read."""
        indices = [index for step in self._drawn[self.begun :] for index in step]
        text, pick = self.task.backbone.prompt_text, self.task.pick

        def render(rows: dict[str, list]) -> dict[str, list]:
            return {**rows, "prompt": [text(decision) for decision in pick(rows["index"])]}

        return Dataset.from_dict({"index": indices}).with_transform(render)

    def whiten(self, batches: int, damping: float) -> None:
        """See :meth:`trainers.trainer.SteeringTrainer.whiten`."""
        sampler = BlockSampler(self.task.decisions, *self._counts, self._seed)

        def log_probs() -> Iterator[Tensor]:
            for _ in range(batches):
                chosen = sampler.draw()
                scores = self.task.backbone.score(self.task.pick(chosen), next_token=True)
                if (table := scores.next_token) is not None:
                    yield table[: len(chosen)]  # behind the prompts

        parameters = list(self.steering.parameters())
        own = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=own), self.evaluating():  # processes sample different answers afterwards
            torch.manual_seed(self._seed)
            sizes = whitening(fisher_diagonal(log_probs, parameters), damping)
        for parameter, size in zip(parameters, sizes, strict=True):
            # A GPU may round it differently in each process.
            self.own_optimizer.state[parameter]["size"] = broadcast(size)

    # TRL's seams

    def _prepare_inputs(self, batch: Any) -> Any:
        for child in self.model.children():
            child.eval()  # dropout off; the model's own flag tells TRL that this is training
        return super()._prepare_inputs(batch)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict]:
        return [self._ids[prompt] for prompt in prompts], None, {}

    def _sample(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator):
            return sample(
                self.task.backbone,
                prompt_ids,
                max_new_tokens=self.max_completion_length,
                temperature=self.temperature,
            )

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rest = (input_ids, attention_mask, logits_to_keep)
        if model is BASE:
            with self.task.unsteered():
                return self._get_per_token_logps_and_entropies(self.model, *rest, *args, **kwargs)
        if not self.share_prompts:
            return super()._get_per_token_logps_and_entropies(model, *rest, *args, **kwargs)
        return *answer_log_probs(self.task.backbone, model, *rest, self.temperature), None

    def after_step(self) -> None:
        """Dual ascent on the step's mean KL a token; what TRL does not measure is added to what it logs."""
        metrics = self._metrics["train"]
        if kl := metrics["kl"]:
            self.kl.update(sum(kl) / len(kl))
            self.beta = self.kl.coefficient
        task = self.task
        metrics["kl_coefficient"].append(self.beta)
        metrics["running_bias"].append(float((task.preference - task.target).abs().sum(-1).mean()))
        metrics["abstention"].append(self.answer_rewards.abstention)
        metrics["sparsity"].append(sparsity(self.steering.parameters()))


class SteeringGRPO(SteeredAnswers, GRPOTrainer):
    """GRPO (Shao et al. 2024, arXiv 2402.03300) on a steering; ``scale_rewards="group"`` gives it as published."""

    estimator = "grpo"
    CONFIG = GRPOConfig
    DEFAULTS = {"loss_type": "dr_grpo", "scale_rewards": "none"}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        return self._sample(prompt_ids), None


class SteeringRLOO(SteeredAnswers, RLOOTrainer):
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740) on a steering."""

    estimator = "rloo"
    CONFIG = RLOOConfig

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        return self._sample(prompt_ids)
