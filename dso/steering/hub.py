"""Where a steering comes from and goes to: a folder, the Hub (``owner/name``), or a Weights & Biases artifact
(``wandb:entity/project/name:version``).

Nothing is asked of a network for a folder. Of an artifact only a steering's own files are fetched, each under its own
name, and kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dso.errors import UserError, first_line
from dso.files import as_path, cache_folder, replace_folder
from dso.steering.config import SteeringError

ARTIFACT = re.compile(r"wandb:((?:[^/:]+/){1,2}[^/:]+:[^/:]+)")
LARGEST = 4 << 30  # bytes of a file of an artifact


def find_folder(source: str | Path, revision: str | None, files: Sequence[str]) -> Path:
    """The folder of a steering, fetched if need be.

    Args:
        files: a steering's own; by the first one it is known.

    Raises:
        SteeringError: if there is none, or it cannot be fetched.
    """
    if isinstance(source, str) and source.startswith("wandb:"):
        return _from_artifact(source, files)
    folder = as_path(source)
    if (folder / files[0]).is_file():
        return folder
    name = str(source)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise SteeringError(f"{source}: no steering there (no {files[0]})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SteeringError(f"{source}: no such folder, and not to be had from the Hub: {first_line(error)}") from error


def upload(folder: Path, name: str, files: Sequence[str], *, private: bool | None, revision: str | None) -> str:
    """Upload a steering's files to a repository of the Hub, which is made if it is not there; gives its address.

    Raises:
        SteeringError: if the Hub is not reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        place = api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(place.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=place.repo_id,
            folder_path=folder,
            allow_patterns=list(files),
            revision=revision,
            commit_message="Upload steering",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SteeringError(f"{name}: not uploaded: {first_line(error)}") from error
    return str(place)


def _from_artifact(source: str, files: Sequence[str]) -> Path:
    if (named := ARTIFACT.fullmatch(source)) is None:
        raise SteeringError(f"{source}: expected wandb:entity/project/name:version")
    try:
        import wandb
        from wandb.errors import Error
    except ImportError as error:
        raise SteeringError(f"{source}: wandb is not installed (pip install wandb)") from error
    try:
        artifact = wandb.Api().artifact(named[1])
        place = cache_folder() / "artifacts" / hashlib.sha256(artifact.digest.encode()).hexdigest()[:32]
        if not (place / files[0]).is_file():
            with replace_folder(place) as fresh:
                _fetch(artifact, files, fresh)
    except UserError:
        raise
    except (Error, OSError, ValueError) as error:
        raise SteeringError(f"{source}: not to be had from Weights & Biases: {first_line(error)}") from error
    return place


def _fetch(artifact: Any, files: Sequence[str], folder: Path) -> None:
    there = [name for name in files if name in artifact.manifest.entries]
    if lacking := {*files} - {*there, "README.md"}:
        raise SteeringError(f"{artifact.name}: no steering there (no {', '.join(sorted(lacking))})")
    for name in there:
        entry = artifact.get_entry(name)
        if entry.ref is not None:
            raise SteeringError(f"{artifact.name}: {name} is a reference to {entry.ref}, expected the file itself")
        if (entry.size or 0) > LARGEST:
            raise SteeringError(f"{artifact.name}: {name} has {entry.size} bytes, more than any steering")
        entry.download(root=str(folder))
