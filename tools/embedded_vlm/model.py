"""The embedded model's architecture, tokenizer and processor: LLaVA with a small CLIP tower and a small Llama."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dso.decisions.sets.drawing import SIDE

PATCH = 16
IMAGE_TOKENS = (SIDE // PATCH) ** 2
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
TEXT = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MEAN, STD = [0.5] * 3, [0.25] * 3
# Words of a message as they are, an image as its slot; nothing stands between a question and its answer.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if not loop.last %} {% endif %}{% endfor %}"
)


def build_processor(words: Sequence[str]) -> Any:
    """The LLaVA processor: CLIP's image processor, and a tokenizer with one token a word, in lower case.

    Question marks are dropped, so that a question ends in the word that it is about.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, model_max_length=128,
    )  # fmt: skip
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=STD
    )
    return LlavaProcessor(
        images, fast, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


def build_model(tokens: int, seed: int) -> Any:
    """The untrained model, of a vocabulary of so many tokens."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    numbers = {f"{name}_token_id": SPECIAL.index(f"<{name}>") for name in ("pad", "bos", "eos")}
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=tokens, max_position_embeddings=128, initializer_range=0.1, **numbers, **TEXT
        ),
        vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, **TOWER),
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-1,
        **numbers,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config)


def save(model: Any, processor: Any, folder: str | Path) -> None:
    """Write weights, config, tokenizer and processor; the folder is replaced as a whole."""
    from dso.files import replace_folder

    with replace_folder(folder) as fresh:
        model.save_pretrained(fresh)
        processor.save_pretrained(fresh)
        for file in fresh.iterdir():
            file.chmod(0o644)  # transformers writes weights for their owner only
