"""Loading a model with its tokenizer, and its processor where it sees: embedded, from a folder, or from the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dso.errors import UserError, first_line
from dso.models.embedded import EMBEDDED, SHIPPED, ModelNotFound, embedded_folder
from dso.models.processor import load_processor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*", "NOTICE*"]
LOADER_ERRORS = (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError)


def load_parts(name: str, revision: str | None, dtype: str, **options: Any) -> tuple[Any, Any, Any]:
    """The model, its tokenizer, and the processor of a vision-language model (None for a text model).

    Args:
        dtype: one of :data:`DTYPES`.
        options: of the model's ``from_pretrained``.

    Raises:
        ModelNotFound: if there is no such model, or it is damaged; the message says what was looked for.
        UserError: if the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    source, config = find_model(name, revision)
    processor, where = None, {"revision": revision, "trust_remote_code": False}
    try:
        kind: Any  # one of transformers' auto classes
        if sees(config):
            processor = load_processor(source, revision, config)
            tokenizer, kind = processor.tokenizer, AutoModelForImageTextToText
        else:
            tokenizer, kind = AutoTokenizer.from_pretrained(source, **where), AutoModelForCausalLM
        model, info = kind.from_pretrained(source, dtype=DTYPES[dtype], output_loading_info=True, **where, **options)
    except LOADER_ERRORS as error:
        raise ModelNotFound(f"model {name!r} could not be loaded: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelNotFound(f"model {name!r} lacks {len(missing)} of its weights, {missing[0]!r} among them")
    return model, tokenizer, processor


def find_model(name: str, revision: str | None) -> tuple[str, Any]:
    """Where transformers finds a model, a folder or an id of the Hub, and its config.

    Raises:
        ModelNotFound: if there is no such model; the message says what was looked for.
    """
    from transformers import AutoConfig

    source = _source(name, revision)
    try:
        return source, AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except LOADER_ERRORS as error:
        raise ModelNotFound(f"model {name!r} could not be loaded: {first_line(error)}") from error


def sees(config: Any) -> bool:
    """Whether a model's config is that of a vision-language model that continues a prompt.

    Raises:
        UserError: if it is one with an encoder for the text.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    found = hasattr(config, "vision_config") and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if found and getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{config.model_type} has an encoder for the prompt; models that continue it are supported")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The name of one of :data:`DTYPES`."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def local_folder(name: str, revision: str | None = None, *, fetch: bool = True) -> Path:
    """The folder with the files of a model: an embedded one, a local one, or one of the Hub.

    Args:
        fetch: whether to ask the Hub for what its local cache lacks.

    Raises:
        ModelNotFound: if there is no such model; the message says what was looked for.
    """
    source = _source(name, revision)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES, local_files_only=not fetch))
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"model {name!r} could not be fetched: {first_line(error)}") from error


def _source(name: str, revision: str | None) -> str:
    """What the loaders are given: a folder, or the id of a model that the Hub or its local cache has."""
    if name in EMBEDDED:
        return str(embedded_folder(name))
    if name in SHIPPED:
        return str(SHIPPED[name])
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)
    if folder.is_dir():
        raise ModelNotFound(f"model {name!r}: no config.json in that folder")
    if not HUB_ID.fullmatch(name):
        known = ", ".join([*EMBEDDED, *SHIPPED])
        raise ModelNotFound(f"model {name!r}: no such folder, not embedded ({known}), and no Hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:  # asked once and early: the loaders go on asking for a minute where there is no network
        snapshot_download(name, revision=revision, allow_patterns=["config.json"])
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"model {name!r}: no such folder, and not to be had from the Hub: {first_line(error)}"
        ) from error
    return name
