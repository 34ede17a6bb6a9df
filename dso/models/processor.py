"""A vision-language model's processor: tokenizer, image processor and chat template in one.

Some processors also take videos, and that part needs torchvision. Without torchvision such a processor is loaded
with its video part left out; its image part has a form that needs Pillow only.
"""

from __future__ import annotations

from typing import Any

from dso.errors import UserError


def images_only(kind: Any) -> Any:
    """A processor class without its video part.

    Raises:
        UserError: if what is left does not begin the class's list of parts.
    """
    parts = kind.get_attributes()
    kept = [part for part in parts if "video" not in part]
    if parts[: len(kept)] != kept:
        needed = "needs torchvision, which is not installed; install it with: pip install torchvision"
        raise UserError(f"{kind.__name__} {needed}")

    class ImagesOnly(kind):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return list(kept)

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            found = super()._get_arguments_from_pretrained(*args, **kwargs)
            return [*found, *[None] * (len(parts) - len(kept))]

    ImagesOnly.__name__, ImagesOnly.__qualname__ = kind.__name__, kind.__qualname__  # what save_pretrained writes
    return ImagesOnly


def load_processor(source: str, revision: str | None, config: Any) -> Any:
    """The processor of a model's folder or Hub id.

    Args:
        config: the model's config, by which transformers knows the processor's class.

    Raises:
        UserError: if the model has none, or it needs a package that is not installed.
    """
    from transformers import PROCESSOR_MAPPING, AutoProcessor
    from transformers.utils import is_torchvision_available

    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    try:
        if kind is None or is_torchvision_available() or "video_processor" not in kind.get_attributes():
            processor = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
        else:
            processor = images_only(kind).from_pretrained(source, revision=revision, trust_remote_code=False)
    except ImportError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"the processor needs a package that is not installed: {' '.join(lines)}") from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise UserError("it has no processor for images (no preprocessor_config.json or processor_config.json)")
    return processor
