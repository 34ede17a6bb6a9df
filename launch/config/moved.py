"""Keys of earlier versions: what they are called now, or why they are gone."""

from __future__ import annotations

MOVED = {
    "data.groups": "data.options.groups",
    "train.steps": "train.max_steps",
    "train.learning_rate": "train.optimizer.learning_rate",
    "train.fisher_batches": "train.optimizer.fisher_batches",
    "train.ppo_epochs": "train.ppo.n_epochs",
    "train.clip_range": "train.ppo.clip_range",
    "train.accumulation": "train.gradient_accumulation_steps",
    "train.micro_batch": "train.gradient_accumulation_steps, in parts of a step",
    "train.preference": "train.preference.estimate",
    "train.hard_preference": "train.preference.hard",
    "train.batch_weight": "train.preference.batch_weight",
    "train.common_weight": "train.preference.common_weight",
    "train.pooling": "train.preference.pooling",
    "train.deterministic": "train.full_determinism",
    "train.abstain_reward": "train.freeform.abstain_reward",
    "train.num_generations": "train.freeform.num_generations",
    "train.max_completion_length": "train.freeform.max_completion_length",
    "train.temperature": "train.freeform.temperature",
    "constraints.kl_coefficient": "constraints.beta",
    "evaluation.every": "evaluation.eval_steps",
    "evaluation.max_accuracy_loss": "constraints.max_accuracy_loss",
    "run.folder": "run.output_dir",
    "run.name": "run.run_name",
    "run.tracking": "run.report_to",
    "run.save_every": "run.save_steps",
    "run.timeout": "run.ddp_timeout",
}
GONE = {
    "train.threads": "set OMP_NUM_THREADS in the environment",
    "train.length_normalised": "candidates are scored by the sum over their tokens",
    "train.share_prompts": "the answers to a prompt always share its pass",
    "train.scale_rewards": "rewards are not divided by their standard deviation",
    "data.train_split": "splits are called train, validation and test",
    "data.validation_split": "splits are called train, validation and test",
    "data.test_splits": "the split test is measured; others are by dso evaluate --split",
    "evaluation.training_decisions": "no run used it; selection holds validation's KL to the budget",
    "evaluation.bootstrap": "intervals are of 1000 resamples",
    "evaluation.validation_stride": "a unit with a dozen contexts and more is asked about in every third of them",
    "evaluation.test_stride": "free-form runs ask the test as they ask validation",
    **dict.fromkeys(
        (
            "train.betas", "train.adam_eps", "train.schedule", "train.warmup", "train.max_grad_norm",
            "train.fisher_damping", "train.smooth_width", "train.dead_zone", "train.preference_decay",
            "train.context_decay", "train.local_weight", "train.unit_weight", "train.max_skipped",
            "constraints.kl_margin", "constraints.dual_learning_rate", "constraints.initial_beta",
        ),
        "a constant now (launch/run/constants.py)",
    ),
}  # fmt: skip


def refusal(path: str) -> str | None:
    """Why a key of an earlier version is refused, and what to do; None for a key that never was."""
    if path in MOVED:
        return f"is now {MOVED[path]}"
    return f"is no longer a key: {GONE[path]}; remove it" if path in GONE else None
