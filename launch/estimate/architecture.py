"""A model's modules without its weights: built on torch's ``meta`` device, where tensors have a shape and no memory.

The shapes come from the first of these that is there; the network is never asked:

1. ``config.json`` of a local folder,
2. ``config.json`` in the Hub's local cache,
3. ``launch/estimate/shapes``: the published shapes of the models that the shipped configs name. They hold what decides
   shapes, nothing else (no rotary base, no token ids), and give the published numbers of parameters, as a test checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dso.errors import first_line
from dso.files import cache_folder
from dso.models.embedded import EMBEDDED, SHIPPED, ModelNotFound
from dso.models.loading import DTYPES, HUB_ID, LOADER_ERRORS, sees

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES = files("launch") / "estimate" / "shapes"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model that has shapes only.

    Attributes:
        model: in eval mode and frozen, on the meta device, its parameters in the dtype that they would have.
        source: where the shapes come from, for people.
        folder: of the tokenizer, where one lies beside the shapes.
    """

    model: PreTrainedModel
    source: str
    folder: Path | None

    @property
    def parameters(self) -> int:
        """How many there are; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def weight_bytes(self) -> int:
        """Memory of the parameters."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def text_config(self) -> Any:
        """The language part's configuration."""
        return self.config.get_text_config()

    @property
    def vision_config(self) -> Any:
        """The vision tower's configuration, None for a text model."""
        return getattr(self.config, "vision_config", None)

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer."""
        return self.model.get_output_embeddings().out_features


def load_architecture(name: str, revision: str | None = None, dtype: str = "float32") -> Architecture:
    """The modules of a model that a config names.

    Raises:
        ModelNotFound: if its shapes are not to be had here, or transformers cannot make a model of them; the message
            says what to do.
    """
    path, source = _find(name, revision)
    try:
        config = _config(path)
        with torch.device("meta"):
            model = _auto_class(config).from_config(config, dtype=DTYPES[dtype])
    except LOADER_ERRORS as error:
        reason = first_line(error)
        raise ModelNotFound(f"model {name!r}: no model can be made of {source}: {reason}") from error
    folder = path.parent if isinstance(path, Path) else None
    return Architecture(model.eval().requires_grad_(False), source, folder)


def shipped_shapes() -> tuple[str, ...]:
    """The models whose shapes come with this package."""
    names = (entry.name.removesuffix(".json") for entry in SHAPES.iterdir() if entry.name.endswith(".json"))
    return tuple(sorted(name.replace("--", "/") for name in names))


def _find(name: str, revision: str | None) -> tuple[Any, str]:
    """A model's config.json, and what it is called."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder / "config.json", str(folder / "config.json")
    if folder.is_dir():
        raise ModelNotFound(f"model {name!r}: no config.json in that folder")
    if name in SHIPPED:
        return SHIPPED[name] / "config.json", "shipped with dso"
    if name in EMBEDDED:
        converted = sorted(cache_folder().glob(f"{name}-*/config.json"))
        return (converted[0], "converted before") if converted else _shipped(name)
    if not HUB_ID.fullmatch(name):
        known = ", ".join([*EMBEDDED, *SHIPPED])
        raise ModelNotFound(f"model {name!r}: no such folder, not embedded ({known}), and no Hub id (owner/name)")
    if cached := _cached(name, revision):
        return cached, "config.json in the Hub's local cache"
    if name in shipped_shapes():
        return _shipped(name)
    raise ModelNotFound(
        f"model {name!r}: its shapes are not known here (no such folder, nothing in the Hub's local cache, none "
        f"shipped); fetch its config once with: hf download {name} config.json"
    )


def _shipped(name: str) -> tuple[Any, str]:
    return SHAPES / f"{name.replace('/', '--')}.json", "shapes shipped with dso"


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found) if isinstance(found, str) else None  # else unknown, or known not to exist


def _config(path: Any) -> Any:
    from transformers import AutoConfig

    with as_file(path) as file:
        return AutoConfig.from_pretrained(str(file), trust_remote_code=False)


def _auto_class(config: Any) -> Any:
    """What loads the whole model: a language model, or one that also sees."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM
