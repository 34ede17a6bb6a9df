"""The way back: the base model's weights from those that ``dso merge`` has written, and the steering.

    print(unmerge("hiring-merged", "hiring-base"))

Merging maps activations by ``D h + c`` (:mod:`dso.exports.maps`), and the same arithmetic with the inverse map,
``D^-1 h - D^-1 c``, takes it out of the weights again; biases that merging brought are dropped. What comes back is the
base model's but for rounding, which is measured where the base model is at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dso.errors import UserError
from dso.exports.folder import copy_rest, write_config, write_weights
from dso.exports.notes import BASE_CARD, NOTES_FILE
from dso.exports.peft import require_new
from dso.exports.plan import Change, MergeError, MergePlan, partial_steering, plan_merge
from dso.exports.probe import probe_ids, read_probe
from dso.exports.report import Distance
from dso.exports.running import computing_in, logits
from dso.exports.shards import Shards
from dso.files import as_path, replace_folder, require_room
from dso.models.loading import DTYPES, dtype_name, load_parts, local_folder
from dso.steering.fingerprint import difference
from dso.steering.model import Steering


@dataclass(frozen=True, slots=True)
class UnmergeReport:
    """What taking a steering out of a folder did.

    Attributes:
        steering, base, scale, dtype: what was taken out of what, and the dtype of what was written.
        hooks: the new folder with the steering's hooks on, against the merged folder, both computed in float32.
        known: whether the steering's fingerprint knows the new weights.
        tensors, differing, largest: of the base model's: how many, how many differ, by how much at most; None where
            the base model is not at hand.
    """

    steering: str
    base: str
    scale: float
    dtype: str
    hooks: Distance
    known: bool
    tensors: int | None
    differing: int | None
    largest: float | None

    def __str__(self) -> str:
        compared = f"{self.base} is not at hand, so the weights were not compared"
        if self.largest is not None:
            number = f"{self.differing} of {self.tensors}"
            compared = f"{number} tensors are off {self.base}'s, by {self.largest:.2g} at most"
        known = "the steering knows these weights as its base model"
        if not self.known:
            known = "rounding moved weights that the steering knows its base model by: attach(model, check=False)"
        return "\n".join(
            [
                f"unmerged     {self.steering} at scale {self.scale:g}, in {self.dtype}",
                f"weights      {compared}",
                f"hooks        with the steering on, logits are {self.hooks} from the merged folder's",
                f"fingerprint  {known}",
            ]
        )


@torch.no_grad()
def unmerge(
    folder: str | Path,
    out: str | Path,
    steering: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
) -> UnmergeReport:
    """Write the model of a merged folder without the steering.

    Args:
        folder: that ``dso merge`` has written; its probe names the steering, the scale and the base model.
        out: a new folder.
        steering: where the steering is now, if not where it was.
        model: the base model to compare with, if not the one that is named; nothing is downloaded.
        dtype: of the weights; by default the one in which the base model's were stored.

    Raises:
        UserError: if the folder has no probe, the steering is not to be found or cannot be inverted, or ``out`` holds
            something.
    """
    source, place = as_path(folder), require_new(out)
    made = read_probe(source).made
    if "switches" not in made:
        raise MergeError(f"{folder}: was written before merging could be undone; merge the base model anew")
    stated = steering or str(made["steering"])
    if not stated:
        raise MergeError(f"{folder}: names no steering; name the one that was merged (--steering)")
    loaded = Steering.from_pretrained(stated)
    scale, base = float(made["scale"]), model or str(made["base_model"])
    shards = Shards(source)
    target = DTYPES[dtype or str(made["base_dtype"])]
    merged, tokenizer, _ = load_parts(str(source), None, dtype_name(shards.dtype()))
    merged.eval().requires_grad_(False)
    plan = plan_merge(loaded, merged, scale)
    part = partial_steering(loaded, plan.left_out)
    brought = sorted({name for owners in made["switches"].values() for name in owners})
    with replace_folder(place) as fresh:
        require_room(fresh, shards.size(target))
        write_weights(shards, fresh, merged, _inverse(plan), target, brought)
        write_config(source, fresh, merged.config, tuple(made["switches"]), dtype_name(target))
        copy_rest(source, fresh, {NOTES_FILE: None, BASE_CARD: NOTES_FILE})
        ids = probe_ids(tokenizer)
        back = load_parts(str(fresh), None, dtype_name(target))[0].eval()
        with computing_in(merged, torch.float32):
            wanted = logits(merged, ids)
        with computing_in(back, torch.float32), part.on(back, scale, check=False):
            hooks = Distance.of(logits(back, ids), wanted)
        known = difference(loaded.config.fingerprint, back, loaded.config.sites) is None
        apart = _compared(Shards(fresh), base, loaded)
        return UnmergeReport(stated, base, scale, dtype_name(target), hooks, known, *apart)


def _inverse(plan: MergePlan) -> MergePlan:
    """The same modules with the inverse maps."""
    return replace(plan, changes={name: _undone(name, change) for name, change in plan.changes.items()})


def _undone(name: str, change: Change) -> Change:
    maps = {"read": change.read, "own": change.own}
    back = {key: None if own is None else own.inverse() for key, own in maps.items()}
    if any(back[key] is None and maps[key] is not None for key in maps):
        raise MergeError(f"{name}: the steering sets a part of it to 0 at this scale, which cannot be undone")
    return replace(change, read=back["read"], own=back["own"])


def _compared(shards: Shards, base: str, steering: Steering) -> tuple[int | None, int | None, float | None]:
    """Number of the base model's tensors, of those that differ, and the largest difference."""
    config = steering.config
    try:
        original = Shards(local_folder(base, config.revision if base == config.base_model else None, fetch=False))
    except (UserError, OSError):
        return None, None, None
    apart = []
    for key in original.header:
        one, other = original.tensor(key), shards.tensor(key)
        apart.append((one.double() - other.double()).abs().max().item() if one.is_floating_point() else 0.0)
    return len(apart), sum(value > 0 for value in apart), max(apart)
