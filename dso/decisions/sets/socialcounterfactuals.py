"""SocialCounterfactuals (Howard et al., "SocialCounterfactuals: Probing and Mitigating Intersectional Social Biases in
Vision-Language Models with Counterfactual Examples", CVPR 2024; Hub data set ``Intel/SocialCounterfactuals``).

Parquet shards with one picture a row:

==================  ===================================================================================
``image``           struct of ``bytes`` (JPEG or PNG) and ``path``
``caption``         "A picture of a White male plumber", "a skinny female Carpenter"
``counterfactual_set``  pictures that differ in the two attributes alone
``a1``, ``a2``      "White", "male"; together ``a1a2``, as in the caption
``a1_type``, ``a2_type``  two of ``race``, ``gender``, ``physical``
==================  ===================================================================================

The occupation is what follows ``a1a2`` in the caption, in lower case. A portrait for
:mod:`dso.decisions.sets.portraits` is a counterfactual set with one value of the other attribute: a plumber who is
White, male in one picture and female in the other. Rows without ``a1a2`` in their caption, and sets without two groups,
are left out; a log message counts them.

Of 171,000 pictures only those of the chosen portraits are read. They are written to a folder, because decisions name
their images by path.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dso.decisions.decision import DecisionError, DecisionSet
from dso.decisions.sets.parquet import parquet_files, pyarrow_parquet, read_table
from dso.decisions.sets.portraits import Portrait, portrait_decisions, some_of_each
from dso.files import cache_folder, write_bytes

ATTRIBUTES = ("gender", "race", "physical")
COLUMNS = ("caption", "counterfactual_set", "a1", "a2", "a1a2", "a1_type", "a2_type")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Row:
    file: Path
    number: int


def load(
    path: str | Path,
    *,
    attribute: str = "gender",
    per_context: int = 4,
    contexts: Sequence[str] | None = None,
    layout: str = "side_by_side",
    questions: Sequence[str] = ("who",),
    abstain: bool = False,
    shards: int | None = None,
    revision: str | None = None,
    pictures: str | Path | None = None,
    seed: int = 0,
) -> DecisionSet:
    """Read SocialCounterfactuals.

    Args:
        path: a folder with the parquet files, or the Hub id ``Intel/SocialCounterfactuals``, whose files are then
            fetched.
        attribute: ``gender``, ``race`` or ``physical``: what the people differ in, while the other attribute is equal.
        per_context: use at most this many portraits of an occupation.
        contexts: the occupations; all when None.
        layout, questions, abstain: of :func:`dso.decisions.sets.portraits.portrait_decisions`.
        shards: fetch at most this many of the Hub's files; all 61 when None.
        revision: of the Hub's data set.
        pictures: the pictures are written here; a folder in dso's cache when None.
        seed: draws which portraits are used and which of them meet.

    Raises:
        DecisionError: if there are no such files, one of them is not as above, or no portrait is left.
    """
    if attribute not in ATTRIBUTES:
        raise DecisionError(
            f"socialcounterfactuals: attribute is {attribute!r}, expected one of {', '.join(ATTRIBUTES)}"
        )
    whole = _whole_sets(parquet_files("socialcounterfactuals", path, revision, shards), attribute)
    groups = sorted({group for rows in whole.values() for group in rows})
    names = {key: f"{key[1]}/{key[2]}" for key in whole}
    portraits = [Portrait(names[key], key[0], dict.fromkeys(rows, "")) for key, rows in whole.items()]
    chosen = {portrait.name for portrait in some_of_each(portraits, per_context, contexts, seed)}
    folder = Path(pictures) if pictures else cache_folder() / "pictures" / "socialcounterfactuals"
    rows_of = {key: rows for key, rows in whole.items() if names[key] in chosen}
    written = _write([row for rows in rows_of.values() for row in rows.values()], folder)
    portraits = [
        Portrait(names[key], key[0], {group: written[row] for group, row in rows.items()})
        for key, rows in sorted(rows_of.items())
    ]
    return portrait_decisions(
        "socialcounterfactuals", portraits, groups, folder=folder, layout=layout, questions=questions, abstain=abstain,
        seed=seed,
    )  # fmt: skip


def _whole_sets(files: Sequence[Path], attribute: str) -> dict[tuple[str, str, str], dict[str, _Row]]:
    """Occupation, counterfactual set and other attribute -> group -> row, of at least two groups."""
    found: dict[tuple[str, str, str], dict[str, _Row]] = defaultdict(dict)
    strange = 0
    for file in files:
        for number, row in enumerate(read_table(file, COLUMNS, "image")):
            occupation = _occupation(row)
            if attribute not in (row["a1_type"], row["a2_type"]):
                continue
            strange += occupation is None
            if occupation is not None:
                group, other = (row["a1"], row["a2"])[:: 1 if row["a1_type"] == attribute else -1]
                found[occupation, row["counterfactual_set"], other][group] = _Row(file, number)
    whole = {key: rows for key, rows in found.items() if len(rows) > 1}
    if strange or len(whole) < len(found):
        _log.info(
            "socialcounterfactuals: left out %d pictures (no attributes in the caption) and %d sets of one group",
            strange, len(found) - len(whole),
        )  # fmt: skip
    return whole


def _occupation(row: dict[str, Any]) -> str | None:
    before, found, after = (row["caption"] or "").lower().partition((row["a1a2"] or "").lower())
    return after.strip(" .") or None if found else None


def _write(rows: Sequence[_Row], folder: Path) -> dict[_Row, str]:
    """The pictures of rows as files; row groups without any of them are not read."""
    wanted: dict[Path, list[_Row]] = defaultdict(list)
    for row in rows:
        wanted[row.file].append(row)
    written = {}
    for file, members in wanted.items():
        opened = pyarrow_parquet().ParquetFile(file)
        start = 0
        for number in range(opened.num_row_groups):
            end = start + opened.metadata.row_group(number).num_rows
            here = [row for row in members if start <= row.number < end]
            if here:
                images = opened.read_row_group(number, columns=["image"]).column("image")
                for row in here:
                    written[row] = _write_image(images[row.number - start].as_py(), row, folder)
            start = end
    return written


def _write_image(image: Any, row: _Row, folder: Path) -> str:
    data = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(data, bytes):
        raise DecisionError(f"{row.file}, row {row.number}: image holds no bytes")
    kind = "png" if data.startswith(b"\x89PNG") else "jpg"
    path = folder / f"{hashlib.sha256(data).hexdigest()[:24]}.{kind}"
    if not path.exists():
        write_bytes(path, data)
    return str(path)
