"""All parts of a study as one record, with what a reader needs to judge and to repeat it."""

from __future__ import annotations

import hashlib
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from dso.evaluation.audit import audit
from dso.evaluation.study import Method, Point, Study
from dso.steering.fingerprint import fingerprint
from dso.steering.model import Steering
from dso.steering.sites import resolve_sites
from launch.config.schema import TrainConfig, resolved_yaml
from launch.study.arms import OURS, all_arms
from launch.study.folder import StudyFolder
from launch.study.materials import Materials
from launch.study.tuning import study_limits
from trainers.callbacks import Limits

SAMPLES, TOKENS = 3, 12  # prompts that are shown, and tokens that are generated after each
SHOWN = (0.0, 0.5, 1.0)  # scales of samples
ELSEWHERE = "elsewhere"  # the part's name
PACKAGES = ("dso", "torch", "transformers", "stable-baselines3")


def gather(folder: StudyFolder, config: TrainConfig, command: str, materials: Materials) -> Study:
    """The study of the parts that are there."""
    methods = []
    for arm in all_arms().values():
        trials, failed = folder.trials(arm.name)
        if trials or failed:
            methods.append(
                Method(
                    name=arm.name,
                    title=arm.title,
                    source=arm.source,
                    kind=arm.kind,
                    trials=tuple(trials),
                    failed=failed,
                )
            )
    ours = next((method for method in methods if method.name == OURS.name and method.trials), None)
    first = folder.read(OURS.name, ours.trials[0].seed) if ours else {}
    steering, other = None, {}
    if ours:
        seed = ours.trials[0].seed
        other = folder.read(ELSEWHERE, seed) if folder.done(ELSEWHERE, seed) else {}
        steering = Steering.from_pretrained(folder.path / "runs" / f"{OURS.name}-s{ours.trials[0].seed}" / "steering")
    base = folder.read("base", 0)
    test = materials.asked["test"]
    policies = {"base": base["policy"]} | ({"steered": first["policy"]} if first.get("policy") else {})
    return Study(
        about=_about(config, command, materials, steering),
        base=Point.from_json(base["point"]),
        methods=tuple(methods),
        samples=tuple(first.get("samples", ())),
        sparsity=_sparsity(steering) if steering else {},
        spillover=other.get("spillover", {}),
        capability=tuple(other.get("capability", ())),
        audit={side: audit(np.array(policy), test).to_json() for side, policy in policies.items()},
    )


def sampled(materials: Materials, steering: Steering) -> list[dict[str, Any]]:
    """What the model goes on with after a few ambiguous prompts of the test, and how probable each group is.

    The prompts are of different contexts and templates, at equal distances over the test.
    """
    asked = [decision for decision in materials.asked["test"] if decision.ambiguous]
    chosen = [asked[(2 * number + 1) * len(asked) // (2 * SAMPLES)] for number in range(SAMPLES)]
    backbone = materials.backbone
    found: list[dict[str, Any]] = [{"prompt": decision.text, "answers": []} for decision in chosen]
    for scale in SHOWN:
        with steering.on(backbone.model, scale), torch.no_grad():
            policies = backbone.score(chosen).policy().exp().tolist()
            for decision, policy, sample in zip(chosen, policies, found, strict=True):
                shares: dict[str, float] = {}
                for candidate, share in zip(decision.candidates, policy, strict=False):
                    shares[candidate.group] = shares.get(candidate.group, 0.0) + round(share, 4)
                text = backbone.generate(decision.prompt, images=decision.images, max_new_tokens=TOKENS)
                method = OURS.title if scale else "base model"
                sample["answers"].append({"method": method, "scale": scale, "text": text, "probabilities": shares})
    return found


def _sparsity(steering: Steering) -> dict[str, dict[str, float]]:
    """By site, how many coefficients there are, how many are not zero, and how long they are together; layer -1 is that
    of a site outside of all layers."""
    found = {}
    for site, operator in steering.operators.items():
        values = torch.cat([value.detach().flatten() for value in operator.parameters()])
        layer = re.search(r"\.(\d+)\.", site)
        found[site] = {
            "layer": float(layer.group(1)) if layer else -1.0,
            "coefficients": values.numel(),
            "nonzero": int(values.count_nonzero()),
            "norm": float(values.norm()),
        }
    return found


def _about(config: TrainConfig, command: str, materials: Materials, steering: Steering | None) -> dict[str, str]:
    model, test = materials.backbone.model, materials.asked["test"]
    sites = resolve_sites(model)
    ambiguous = [decision for decision in test if decision.ambiguous]
    units = len({decision.unit or decision.id for decision in ambiguous})
    about = {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "model": config.model.name + (f", revision {config.model.revision}" if config.model.revision else ""),
        "weights": _digest("".join(fingerprint(model, sites).values()).encode()),
    }
    if steering is not None:
        coefficients = (value.detach().cpu().contiguous().numpy().tobytes() for value in steering.tensors().values())
        about["steering"] = _digest(b"".join(coefficients))
    about |= {
        "decision set": f"{config.data.set}, groups {', '.join(test.groups)}",
        "test": f"{len(ambiguous)} ambiguous decisions about {units} units in {len(test.contexts)} contexts, and "
        f"{len(test) - len(ambiguous)} unambiguous ones; nothing was chosen on them",
        "validation": f"{len(materials.asked['validation'])} decisions, on which every candidate and scale was chosen",
        "limits": limits_in_words(study_limits(config)),
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES) + f", Python {platform.python_version()}",
        "config": resolved_yaml(config),
    }
    return about


def limits_in_words(limits: Limits) -> str:
    """The limits that are set, for a reader of the report."""
    said = (
        ("KL at most {}", limits.kl_budget),
        ("KL after neutral texts at most {}", limits.neutral_kl),
        ("KL on unambiguous decisions at most {}", limits.unambiguous_kl),
        ("answer mass at least {} of the base's", limits.min_answer_mass),
        ("accuracy at most {} below the base's", limits.max_accuracy_loss),
        ("order effect at most {} above the base's", limits.order_increase),
    )
    return "; ".join(text.format(value) for text, value in said if value is not None)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
