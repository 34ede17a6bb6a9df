"""Running a study: every method with every seed, each a part that is done once, and the record of all of them.

tune      a baseline's candidates and scales on validation, inside the limits of the config
measure   what was chosen, on the test; with the first seed also at scales beside it, for the curve
gather    all parts that are there as one :class:`~dso.evaluation.study.Study`
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dso.baselines.baseline import BaselineError, Candidate
from dso.baselines.random_directions import random_like
from dso.errors import UserError
from dso.evaluation.study import Trial
from dso.reports.page import write_report
from dso.steering.model import Steering
from launch.config.schema import TrainConfig, load_config
from launch.run.train import last_step, learned
from launch.study.arms import OURS, Arm
from launch.study.elsewhere import elsewhere
from launch.study.folder import StudyFolder
from launch.study.gathering import ELSEWHERE, gather, sampled
from launch.study.materials import Materials
from launch.study.tuning import Choice, Judge, at_kl, study_limits, tune, within
from trainers.state.saved import read_state

DRAWS = 10  # of the null
OWN_SCALES = (0.25, 0.5, 0.75, 1.0)  # of a steering that was trained, whose range ends at 1
LADDER, WIDEST = (0.25, 0.5, 1.0, 2.0, 4.0), 8.0  # scales of what others trained
AROUND = (0.5, 1.0, 1.5)  # times the chosen scale
WAIT = 2.0  # seconds between looks at what other processes have done


def measured_config(source: str, overrides: Sequence[str], options: dict[str, Any]) -> TrainConfig:
    """The config of a study, with options of its own for the decisions that it measures.

    Raises:
        UserError: if it cannot be used, or trains on free-form answers.
    """
    config = load_config(source, overrides)
    if config.freeform:
        raise UserError(f"{source}: trains on free-form answers; dso compare measures probabilities of candidates")
    data = config.data.model_copy(update={"options": {**config.data.options, **options}})
    return config.model_copy(update={"data": data})


class Running:
    """A study as it runs.

    Args:
        source: the config's name or path. overrides: of it.
        config: what they say, with the study's own options of the decisions (:func:`measured_config`).
        folder: of the study.
        seconds: of wall clock that each baseline has to be made and tuned with each seed.
        quiet: show no progress.
    """

    def __init__(
        self,
        source: str,
        overrides: Sequence[str],
        config: TrainConfig,
        folder: StudyFolder,
        seconds: float,
        quiet: bool = False,
    ):
        self.source, self.overrides = source, tuple(overrides)
        self.config = config
        self.folder, self.seconds, self.quiet = folder, seconds, quiet
        self._bar: tqdm | None = None
        self._materials: Materials | None = None
        self._matched: tuple[Steering, float] | None = None  # ours with its KL on validation, which the null is put at

    @property
    def materials(self) -> Materials:
        """Made when they are first needed: a run of ``dso train`` loads a model of its own."""
        if self._materials is None:
            self._materials = Materials(self.config, self.folder.path / "training.safetensors", self._passed)
        return self._materials

    def run(self, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
        """Do every part that is not there yet, all methods of one seed before the next one's.

        What another process is at is left to it; when nothing else is left, it is waited for.
        """
        parts = [(arm, seed) for seed in seeds for arm in arms if arm.kind != "null"]
        parts += [(arm, seed) for arm in arms if arm.kind == "null" for seed in range(DRAWS)]
        said = False
        while left := [part for part in parts if not self.folder.done(part[0].name, part[1])]:
            taken = [self._take(arm, seed, parts, first=seed == seeds[0]) for arm, seed in left]
            if not any(taken):
                if not said:
                    self._say(f"waiting for {len(left)} parts that other processes are at")
                said = True
                time.sleep(WAIT)
        self._once("base", 0, self._base)

    def _once(self, name: str, seed: int, make: Callable[[], dict[str, Any]]) -> None:
        """Make a part that is needed now, or wait for the process that is at it."""
        while not self.folder.done(name, seed):
            with self.folder.taking(name, seed) as mine:
                if mine:
                    self.folder.keep(name, seed, make())
            if not mine:
                time.sleep(WAIT)

    def _take(self, arm: Arm, seed: int, parts: Sequence[tuple[Arm, int]], first: bool) -> bool:
        """Do a part, unless another process is at it or at what it needs; whether it was done."""
        ours = [part for part in parts if part[0].kind == "ours"]
        if arm.kind == "null" and not all(self.folder.done(arm.name, seed) for arm, seed in ours):
            return False
        with self.folder.taking(arm.name, seed) as mine:
            if mine:
                self._say(f"{parts.index((arm, seed)) + 1} of {len(parts)}: {arm.title}, seed {seed}")
                hidden = self.quiet or not sys.stderr.isatty()
                with tqdm(desc=f"{arm.name} s{seed}", unit="decision", disable=hidden) as bar:
                    self._bar = bar
                    self._part(arm, seed, first)
                self._bar = None
            return mine

    def look_elsewhere(self, data: Path, limit: int | None) -> None:
        """Measure what ours, with its first seed, does where it was not meant to act, if that is not there yet."""
        seeds = [trial.seed for trial in self.folder.trials(OURS.name)[0]]
        if not seeds:
            raise UserError("--data: benchmarks are asked of ours, which is not there; add ours to --methods")

        def found() -> dict[str, Any]:
            self._say("other attributes and a capability task")
            return elsewhere(self.materials, self._ours(seeds[0]), data, limit)

        self._once(ELSEWHERE, seeds[0], found)

    def write(self, command: str) -> Path:
        """Gather all parts, and write the report; its path."""
        return write_report(gather(self.folder, self.config, command, self.materials), self.folder.path)

    def _base(self) -> dict[str, Any]:
        point = self.materials.base_point()
        return {"point": point.to_json(), "policy": _short(self.materials.base.policy)}

    def _part(self, arm: Arm, seed: int, first: bool) -> None:
        started = time.monotonic()
        try:
            if arm.overrides is not None:
                trial, policy = self._trained(arm, seed, first)
            elif arm.baseline is not None:
                trial, policy = self._tuned(arm, seed, first)
            else:
                trial, policy = self._random(seed)
        except BaselineError as error:
            self._say(f"{arm.title}: {error}")
            self.folder.keep(arm.name, seed, {"failed": str(error)})
            return
        record: dict[str, Any] = {"trial": trial.to_json(), "wall": round(time.monotonic() - started, 1)}
        if arm.kind == "ours" and first:
            record |= {"policy": _short(policy), "samples": sampled(self.materials, self._ours(seed))}
        self.folder.keep(arm.name, seed, record)

    def config_of(self, arm: Arm, seed: int) -> TrainConfig:
        """Of a run of ``dso train``."""
        places = (
            f"run.output_dir={self.folder.path / 'runs'}",
            f"run.run_name={arm.name}-s{seed}",
            f"train.seed={seed}",
        )
        return load_config(self.source, [*self.overrides, *(arm.overrides or ()), *places])

    def _run(self, arm: Arm, seed: int) -> Path:
        return learned(self.config_of(arm, seed), name=f"{arm.name}-s{seed}", quiet=True)

    def _ours(self, seed: int) -> Steering:
        return Steering.from_pretrained(self._run(OURS, seed) / "steering")

    def _trained(self, arm: Arm, seed: int, first: bool) -> tuple[Trial, np.ndarray | None]:
        """A run of ``dso train``. Ours chooses its own scale; others end with their last step, whose scale is tuned."""
        folder = self._run(arm, seed)
        facts = read_state(folder / "state").facts["extra"]
        seconds = float(facts["seconds"])
        if arm.kind == "ours":
            steering = self._ours(seed)
            kept = any(bool(value.any()) for value in steering.tensors().values())
            why = "" if kept else "no step was inside the limits"
            tried = len(facts["selection"]["history"]) - 1
            choice = Choice(Candidate("as trained", steering), 1.0, kept, why, tried)
            return self._measured(choice, seed, seconds, OWN_SCALES if first and kept else (1.0,))
        steering = last_step(folder)
        steering.config = replace(steering.config, scale_range=(0.0, WIDEST))
        choice, tuning = self._choose((Candidate("last step", steering),), LADDER)
        seconds += tuning
        return self._measured(choice, seed, seconds, _around(choice) if first else (choice.scale,))

    def _choose(
        self, candidates: Iterable[Candidate], scales: tuple[float, ...], part: Judge | None = None
    ) -> tuple[Choice, float]:
        """What validation chooses, and the seconds that it took."""
        judge = self.materials.judge  # what all methods are given is not on their clock
        started = time.monotonic()
        choice = tune(candidates, scales, judge, study_limits(self.config), self.seconds, part=part)
        return choice, time.monotonic() - started

    def _tuned(self, arm: Arm, seed: int, first: bool) -> tuple[Trial, np.ndarray | None]:
        assert arm.baseline is not None
        task, alone = self.materials.task(seed, self.seconds), len(arm.baseline.scales) == 1
        part = None if alone else self.materials.part
        choice, seconds = self._choose(arm.baseline.propose(task), arm.baseline.scales, part)
        return self._measured(choice, seed, seconds, _around(choice) if first and not alone else (choice.scale,))

    def _random(self, seed: int) -> tuple[Trial, np.ndarray | None]:
        """A draw of the null, at the KL that ours has on validation."""
        seeds = [trial.seed for trial in self.folder.trials(OURS.name)[0]]
        if not seeds:
            raise UserError(
                "random directions are measured at the KL of ours, which is not there; add ours to --methods"
            )
        started = time.monotonic()
        if self._matched is None:
            ours = self._ours(seeds[0])
            self._matched = ours, self.materials.judge.measure(ours, 1.0).kl
        ours, wanted = self._matched
        drawn = random_like(ours, seed)
        if not wanted > 0:
            raise BaselineError("ours is the base model, so there is no KL to have random directions at")
        scale = at_kl(lambda scale: self.materials.judge.measure(_turned(drawn, scale), 1.0).kl, wanted)
        choice = Choice(Candidate(f"turned to {scale:.2g}", _turned(drawn, scale)), 1.0, True, "", 1)
        return self._measured(choice, seed, time.monotonic() - started, (1.0,))

    def _measured(
        self, choice: Choice, seed: int, seconds: float, scales: Sequence[float]
    ) -> tuple[Trial, np.ndarray | None]:
        """The trial of a choice on the test, and the policy at the scale that was chosen."""
        steering, points, policy = choice.candidate.steering, [], None
        for scale in within(steering, sorted({round(s, 6) for s in scales})):
            point, measured = self.materials.point(steering, scale)
            points.append(point)
            if math.isclose(scale, choice.scale, rel_tol=1e-5):
                policy = measured.policy
        return Trial(
            seed=seed,
            label=choice.candidate.label,
            chosen=round(choice.scale, 6) if choice.inside else None,
            why=choice.why,
            tried=choice.tried,
            seconds=round(seconds, 1),
            points=tuple(points),
        ), policy

    def _passed(self, decisions: int) -> None:
        if self._bar is not None:
            self._bar.update(decisions)

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(f"dso: {text}", file=sys.stderr, flush=True)


def _around(choice: Choice) -> tuple[float, ...]:
    return tuple(choice.scale * factor for factor in AROUND)


def _turned(steering: Steering, scale: float) -> Steering:
    """The steering that does at scale 1 what this one does at ``scale``, which may be beyond its range."""
    turned = Steering(steering.config)
    turned.load_tensors(steering.scaled_tensors(scale))
    return turned.requires_grad_(False)


def _short(policy: np.ndarray | None) -> list[list[float]]:
    """A policy with as many digits as an audit needs."""
    return [] if policy is None else np.round(policy, 6).tolist()
