"""GenderBias-VL (Xiao et al., "GenderBias-VL: Benchmarking Gender Bias in Vision Language Models via Counterfactual
Probing", arXiv 2407.00600; Hub data set ``xiaoyisong/GenderBias-VL``).

The published folder has pictures of 177 occupations and questions about them:

- ``xl_generate_base/<Occupation>/<gender>/<file>``: a drawn person, from ``xl_generate_base.tar.gz``;
- ``xl_generate_cf_via_instructpix2pix/<Occupation>/<gender>/<file>``: the same picture with the other gender;
- ``test_meta_file/Vbias/occ_test_base_ask_person.json`` and the like: a list of records with ``occ`` (who is shown),
  ``occ_sim`` (an occupation that is alike but stereotyped with the other gender), ``gender`` (of the base picture),
  ``image_type`` (``base`` or ``cf``) and ``image`` (the path). The Hub also serves these records as parquet.

The questions of the benchmark show one person. Here, as in DSO (arXiv 2512.15926), they show two: a portrait for
:mod:`dso.decisions.sets.portraits` is a base picture with its counterfactual, and ``occ_sim`` names the occupations
that it is set beside if possible. "Waitress" is read as "waiter", because the word would give the answer away.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dso.decisions.decision import DecisionError, DecisionSet
from dso.decisions.sets.parquet import read_table
from dso.decisions.sets.portraits import Portrait, portrait_decisions, some_of_each
from dso.errors import first_line
from dso.files import cache_folder

GROUPS = ("female", "male")
BASE, SWAPPED = "xl_generate_base", "xl_generate_cf_via_instructpix2pix"
META = "test_meta_file/Vbias/occ_test_base_ask_person.json"
FIELDS = ("occ", "occ_sim", "gender", "image_type", "image")


def load(
    path: str | Path,
    *,
    meta: str | Path = META,
    per_context: int = 4,
    contexts: Sequence[str] | None = None,
    layout: str = "side_by_side",
    questions: Sequence[str] = ("who",),
    abstain: bool = False,
    revision: str | None = None,
    pictures: str | Path | None = None,
    seed: int = 0,
) -> DecisionSet:
    """Read GenderBias-VL.

    Args:
        path: the folder with the published files, its archives unpacked; or the Hub id, whose archives are fetched
            and unpacked into dso's cache.
        meta: the records, JSON or parquet, relative to the folder.
        per_context: use at most this many portraits of an occupation.
        contexts: the occupations; all when None.
        layout, questions, abstain: of :func:`dso.decisions.sets.portraits.portrait_decisions`.
        revision: of the Hub's data set.
        pictures: pictures of two people are written here; a folder in dso's cache when None.
        seed: draws which portraits are used and which of them meet.

    Raises:
        DecisionError: on a missing file, or a record that is not as above, with file and number.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _fetch(str(path), revision)
    partners: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for number, record in enumerate(_records(folder / meta)):
        image = _checked(record, f"{folder / meta}, record {number}")
        if record["image_type"] == "base":
            key = (_occupation(record["occ"]), record["gender"], image)
            partners[key].add(_occupation(record["occ_sim"]))
    portraits = [
        Portrait(image.removeprefix(f"{BASE}/"), occupation, {gender: image}, tuple(sorted(alike)))
        for (occupation, gender, image), alike in partners.items()
    ]
    if not portraits:
        raise DecisionError(f"{folder / meta}: no record of a base picture")
    chosen = [_with_files(portrait, folder) for portrait in some_of_each(portraits, per_context, contexts, seed)]
    made = Path(pictures) if pictures else cache_folder() / "pictures" / "genderbias-vl"
    return portrait_decisions(
        "genderbias-vl", chosen, GROUPS, folder=made, layout=layout, questions=questions, abstain=abstain, seed=seed
    )


def _occupation(name: str) -> str:
    occupation = name.strip().lower()
    return "waiter" if occupation == "waitress" else occupation


def _checked(record: Any, where: str) -> str:
    """The record's image path, with forward slashes."""
    if not isinstance(record, dict) or not all(isinstance(record.get(field), str) for field in FIELDS):
        raise DecisionError(f"{where}: expected an object with the strings {', '.join(FIELDS)}")
    if record["gender"] not in GROUPS:
        raise DecisionError(f"{where}: gender is {record['gender']!r}, expected one of {', '.join(GROUPS)}")
    image = record["image"].replace("\\", "/")
    if record["image_type"] == "base" and not image.startswith(f"{BASE}/"):
        raise DecisionError(f"{where}: image is {image!r}, expected a path below {BASE}/")
    return image


def _with_files(portrait: Portrait, folder: Path) -> Portrait:
    """The portrait with the paths of both its pictures, which have to exist."""
    ((gender, image),) = portrait.pictures.items()
    other = GROUPS[1 - GROUPS.index(gender)]
    files = {gender: folder / image, other: folder / image.replace(BASE, SWAPPED, 1)}
    for file in files.values():
        if not file.is_file():
            archive = folder / f"{file.relative_to(folder).parts[0]}.tar.gz"
            hint = f"; unpack {archive}" if archive.is_file() else ""
            raise DecisionError(f"genderbias-vl: no picture {file}{hint}")
    pictures = {group: str(files[group]) for group in GROUPS}
    return Portrait(portrait.name, portrait.context, pictures, portrait.partners)


def _records(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        return read_table(path, FIELDS)
    try:
        records = json.loads(path.read_bytes())
    except OSError as error:
        raise DecisionError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DecisionError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(records, list):
        raise DecisionError(f"{path}: expected a list of records, found {type(records).__name__}")
    return records


def _fetch(name: str, revision: str | None) -> Path:
    """The Hub's files in dso's cache, with the archives unpacked."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise DecisionError(
            f"genderbias-vl: there is no folder {name!r}; give the folder of the published files, or a Hub id"
        )
    import tarfile

    from huggingface_hub import snapshot_download

    folder = cache_folder() / "genderbias-vl" / (revision or "main")
    try:
        snapshot_download(
            name,
            repo_type="dataset",
            revision=revision,
            local_dir=folder,
            allow_patterns=["test_meta_file/**", f"{BASE}.tar.gz", f"{SWAPPED}.tar.gz"],
        )
        for archive in (BASE, SWAPPED):
            if not (folder / archive).is_dir():
                with tarfile.open(folder / f"{archive}.tar.gz") as packed:
                    packed.extractall(folder, filter="data")
    except (OSError, ValueError, tarfile.TarError) as error:
        reason = first_line(error)
        raise DecisionError(f"genderbias-vl: {name!r} cannot be fetched from the Hub: {reason}") from error
    return folder
