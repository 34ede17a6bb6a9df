"""Merging a steering at a fixed scale into a plain checkpoint, which loads and runs without this library.

    merging = Merging.of(Steering.from_pretrained("runs/hiring/steering"), scale=0.4)
    merging.plan.left_out                    # what has no place in this architecture, and why
    print(merging.write("hiring-merged"))

Weights go from file to file one tensor at a time. The model itself is loaded in the dtype that it is stored in, which
maps its files into memory; it is run on a few short prompts, to be held against the hooks and to make the probe.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dso.exports.folder import copy_rest, require_ours, write_config, write_weights
from dso.exports.notes import BASE_CARD, NOTES_FILE, notes
from dso.exports.plan import MergeError, MergePlan, partial_steering, plan_merge
from dso.exports.probe import BASE, make_probe, probe_ids, versions
from dso.exports.report import Distance, MergeReport
from dso.exports.running import computing_in, logits, merged_parameters, new_zeros, with_parameters
from dso.exports.shards import Shards
from dso.exports.verify import judge_logits
from dso.files import PART, as_path, replace_folder, require_room
from dso.models.loading import DTYPES, dtype_name, load_parts, local_folder
from dso.steering.model import Steering

SAME = 1e-5  # of the largest logit: what a folder may be off itself
LOST = 0.01  # share of the changes that may vanish in the dtype of the folder before it is refused


@dataclass(slots=True)
class Merging:
    """A steering, the model it goes into, and the plan; made by :meth:`of`.

    Attributes:
        steering, scale: what is merged.
        source: the folder of the base model.
        model, tokenizer, processor: the base model in the dtype that it is stored in; no processor for a text model.
        plan: what goes where.
    """

    steering: Steering
    scale: float
    source: Path
    model: Any
    tokenizer: Any
    processor: Any
    plan: MergePlan

    @classmethod
    def of(cls, steering: Steering, scale: float | None = None, model: str | None = None) -> Merging:
        """Load the base model and see what goes where; nothing is written.

        Args:
            scale: within the range that the steering states; its default when None.
            model: folder or Hub id of the base model; by default the one that the steering states.

        Raises:
            MergeError: if there is nothing to merge.
            UserError: if the model cannot be loaded, is not the one that the steering was made for, or is quantised.
        """
        config = steering.config
        scale = config.default_scale if scale is None else scale
        name = model or config.base_model
        if not name:
            raise MergeError("the steering names no base model; name one (--model)")
        if scale == 0:
            raise MergeError("scale 0 is the base model; there is nothing to merge")
        folder = local_folder(name, config.revision if name == config.base_model else None)
        stored = Shards(folder).dtype()
        loaded, tokenizer, processor = load_parts(str(folder), None, dtype_name(stored))
        if getattr(loaded.config, "quantization_config", None) is not None:
            raise MergeError(f"{name}: its weights are quantised; merge into the plain model and quantise that")
        loaded.eval().requires_grad_(False)
        with steering.on(loaded, scale):  # refuses other weights, and scales that are out of range
            pass
        return cls(steering, scale, folder, loaded, tokenizer, processor, plan_merge(steering, loaded, scale))

    @property
    def part(self) -> Steering:
        """The steering without what cannot be merged."""
        return partial_steering(self.steering, self.plan.left_out)

    def require_all(self) -> None:
        """Refuse to go on without a part of the steering.

        Raises:
            MergeError: naming what has no place.
        """
        if left := self.plan.left_out:
            number = len({entry.site for entry in left})
            raise MergeError(
                f"{number} of {len(self.steering.config.sites)} sites cannot be merged in full. {left[0].site}: its "
                f"{left[0].part} has no place, as {left[0].reason}. --allow-partial leaves such parts out; a steering "
                "without offsets (steering.operator=scale) goes into every norm"
            )

    def write(
        self,
        out: str | Path,
        dtype: str | None = None,
        *,
        allow_partial: bool = False,
        allow_rounding: bool = False,
        stated: str = "",
    ) -> MergeReport:
        """Write the merged checkpoint into a folder.

        The folder is filled beside its place, loaded and held against the hooks, and only then moved there. One that
        an earlier merge has written and nobody has added to is replaced.

        Args:
            out: the folder.
            dtype: of the weights, as in ``float32``; by default the one they are stored in.
            allow_partial: leave out what has no place.
            allow_rounding: accept changes that vanish in ``dtype``.
            stated: what the folder's README calls the steering.

        Raises:
            MergeError: if something has no place, or vanishes, and that was not allowed; or if the folder has other
                files in it.
            OSError: if the disk has no room for it.
        """
        if dtype not in (None, *DTYPES):
            raise MergeError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        target = Shards(self.source).dtype() if dtype is None else DTYPES[dtype]
        place = as_path(out)
        require_ours(place, self.source)
        if not allow_partial:
            self.require_all()
        if not self.plan.changes:
            raise MergeError("nothing of the steering can be merged into this model")
        exact = merged_parameters(self.plan, self.model)
        lost, changed = self._lost(exact, target)
        if lost > LOST and not allow_rounding:
            raise MergeError(
                f"{lost:.0%} of the {changed} values that change would stay what they were in {dtype_name(target)}, "
                f"whose steps near 1 are {torch.finfo(target).eps:.2g}. --dtype float32 keeps the changes; "
                "--allow-rounding goes on without them"
            )
        for left in place.parent.glob(f".{place.name}.*{PART}"):  # of a merge that was killed
            shutil.rmtree(left, ignore_errors=True)
        with replace_folder(place) as fresh:
            return self._fill(fresh, target, exact, lost, changed, stated)

    @torch.no_grad()
    def _fill(
        self, fresh: Path, target: torch.dtype, exact: dict[str, Tensor], lost: float, changed: int, stated: str
    ) -> MergeReport:
        shards = Shards(self.source)
        require_room(fresh, shards.size(target))
        write_weights(shards, fresh, self.model, self.plan, target)
        write_config(self.source, fresh, self.model.config, tuple(self.plan.switches), dtype_name(target))
        copy_rest(self.source, fresh, {NOTES_FILE: BASE_CARD})
        ids = probe_ids(self.tokenizer)
        model = self.model
        if target != shards.dtype():
            model = load_parts(str(self.source), None, dtype_name(target))[0].eval()
        hooked, merged, wanted, others = self._in_float32(model, ids, exact, target)
        with self.part.on(model, self.scale, check=False):
            hooked_in_target = logits(model, ids)
        loaded = load_parts(str(fresh), None, dtype_name(target))[0].eval()
        with computing_in(loaded, torch.float32):
            off = Distance.of(logits(loaded, ids), wanted).largest
        if off > SAME * (1 + wanted.abs().max().item()):
            raise MergeError(
                f"what was written is not what was meant: loaded anew, its logits are {off:.3g} off. Nothing was kept; "
                "this is a fault of dso, or of how transformers reads this model's files"
            )
        saved = Distance.of(logits(loaded, ids), hooked_in_target)
        with computing_in(loaded, torch.bfloat16):
            rounded = logits(loaded, ids)
        base_name = self.steering.config.base_model or self.source.name
        made = {
            "steering": stated, "base_model": base_name, "scale": self.scale, "dtype": dtype_name(target),
            "base_dtype": dtype_name(shards.dtype()), "partial": bool(self.plan.left_out),
            "switches": {name: list(owners) for name, owners in self.plan.switches.items()}, "versions": versions(),
        }  # fmt: skip
        last = {name: values[:, -1] for name, values in others.items()}
        probe = make_probe(self.tokenizer, ids, wanted[:, -1], rounded[:, -1], last, made)
        rows = {tuple(row): logit for row, logit in zip(ids.tolist(), rounded[:, -1], strict=True)}
        narrow = torch.stack([rows[prompt.ids] for prompt in probe.prompts])
        report = MergeReport(
            steering=stated, base=base_name, scale=self.scale, dtype=dtype_name(target),
            sites=len(self.steering.config.sites), left_out=tuple(self.plan.left_out),
            effect=Distance.of(hooked, others[BASE]), float32=Distance.of(merged, hooked), saved=saved,
            dtype_itself=Distance.of(hooked_in_target, hooked),
            changed=changed, lost=lost, probe=probe, bfloat16=judge_logits(probe, narrow),
        )  # fmt: skip
        text = notes(report, sees=self.processor is not None, base_card=(fresh / BASE_CARD).is_file())
        (fresh / NOTES_FILE).write_text(text, encoding="utf-8")
        probe.write(fresh)
        replace(probe, made=made | {"files": sorted(path.name for path in fresh.iterdir())}).write(fresh)
        return report

    def _in_float32(
        self, model: Any, ids: Tensor, exact: dict[str, Tensor], target: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Logits of the hooks, of the merged weights, of those as they are stored, and of other models by name."""
        stored = {name: value.to(target).float() for name, value in exact.items()}
        zeros = new_zeros(self.plan, model)
        with computing_in(model, torch.float32):
            others = {BASE: logits(model, ids)}
            with self.part.on(model, self.scale, check=False):
                hooked = logits(model, ids)
            found = []
            for values in (exact, stored):
                with with_parameters(model, zeros | values):
                    found.append(logits(model, ids))
            for name, without in self._skipping():
                with with_parameters(model, zeros | stored | {key: zeros[key] for key in without}):
                    others[name] = logits(model, ids)
        return hooked, found[0], found[1], others

    def _skipping(self) -> Iterator[tuple[str, list[str]]]:
        """What a program may serve that has no slots for new biases: its name, and which biases it lacks."""
        keys = {switch: [f"{name}.bias" for name in owners] for switch, owners in self.plan.switches.items()}
        for switch, own in keys.items():
            yield f"merged model without {switch}", own
        if len(keys) > 1:
            yield f"merged model without {' and '.join(keys)}", [key for own in keys.values() for key in own]

    def _lost(self, exact: Mapping[str, Tensor], target: torch.dtype) -> tuple[float, int]:
        """The share of changed values that the dtype does not tell from the old ones, and their number."""
        lost = changed = 0
        for name, value in exact.items():
            owner, _, key = name.rpartition(".")
            old = self.model.get_submodule(owner)._parameters.get(key)
            before = torch.zeros_like(value) if old is None else old.float()
            moved = value != before
            changed += int(moved.sum())
            lost += int((moved & (value.to(target) == before.to(target))).sum())
        return lost / max(changed, 1), changed
