"""``dso freeform`` with training answers that do not depend on which process writes them.

    deepspeed --num_accelerators 2 --no_local_rank tests/helpers/answer_worker.py CONFIG [OPTION ...]

So that runs of one process and of several learn from the same answers and can be compared; what was learned last is
kept too (in the folder ``last`` beside the run), whether the run keeps it or not.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from trainers.grpo import SteeredAnswers

RELEASE = SteeredAnswers.release


def scripted(trainer: Any, prompts: list[list[int]]) -> list[list[int]]:
    """An answer by its place among those of all processes in this step: mostly candidates, with other letters."""
    candidates = trainer.task.decisions[0].candidates
    letters = [trainer.task.backbone.tokenizer(candidate.text).input_ids[0] for candidate in candidates]
    first = int(os.environ.get("RANK", "0")) * len(prompts)
    answers = []
    for place in range(first, first + len(prompts)):
        generator = torch.Generator().manual_seed(10_000 * trainer.state.global_step + place)
        chosen = torch.randint(0, 4, (3,), generator=generator).tolist()
        answers.append([[*letters, 50, 60][number] for number in chosen])
    return answers


def keep_last(trainer: Any) -> None:
    """What :meth:`SteeredAnswers.release` does, after the operators were saved as training left them."""
    if int(os.environ.get("RANK", "0")) == 0:
        trainer.steering.save_pretrained(Path(trainer.args.output_dir) / "last")
    RELEASE(trainer)


if __name__ == "__main__":
    from launch.cli import main

    SteeredAnswers._sample, SteeredAnswers.release = scripted, keep_last
    raise SystemExit(main(["freeform", *sys.argv[1:]]))
