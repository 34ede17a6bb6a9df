"""Parquet files of published sets, from a folder or from the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dso.decisions.decision import DecisionError
from dso.errors import first_line


def parquet_files(name: str, path: str | Path, revision: str | None, most: int | None) -> list[Path]:
    """The parquet files of a folder or of a Hub data set, in order.

    Raises:
        DecisionError: if there are none.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        files = sorted(folder.rglob("*.parquet"))
        if not files:
            raise DecisionError(f"{name}: no parquet file in {folder}")
        return files[:most]
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise DecisionError(
            f"{name}: there is no folder {str(path)!r}; give one with the parquet files, or a Hub id (owner/name)"
        )
    from huggingface_hub import HfApi, hf_hub_download

    kind = "dataset"
    try:
        listed = HfApi().list_repo_files(str(path), repo_type=kind, revision=revision)
        names = sorted(file for file in listed if file.endswith(".parquet"))
        files = [Path(hf_hub_download(str(path), file, repo_type=kind, revision=revision)) for file in names[:most]]
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise DecisionError(
            f"{name}: there is no folder {str(path)!r}, and the Hub does not give it: {reason}"
        ) from error
    if not files:
        raise DecisionError(f"{name}: the Hub's {path} has no parquet file")
    return files


def read_table(file: Path, columns: Sequence[str], *others: str) -> list[dict[str, Any]]:
    """The rows of a parquet file, of these columns only.

    Raises:
        DecisionError: if it cannot be read, lacks one of the columns or of the ``others``, or pyarrow is not installed.
    """
    parquet = pyarrow_parquet()
    try:
        opened = parquet.ParquetFile(file)
        if missing := [column for column in (*columns, *others) if column not in opened.schema_arrow.names]:
            raise DecisionError(f"{file}: has no column {missing[0]!r}; it has {', '.join(opened.schema_arrow.names)}")
        return opened.read(columns=list(columns)).to_pylist()
    except DecisionError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are of these two
        raise DecisionError(f"{file}: cannot be read as parquet: {str(error).splitlines()[0]}") from error


def pyarrow_parquet() -> Any:
    """The module ``pyarrow.parquet``.

    Raises:
        DecisionError: if it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DecisionError(
            "parquet files need pyarrow, which is not installed; install it with: pip install 'dso[vision]'"
        ) from error
    return pyarrow.parquet
