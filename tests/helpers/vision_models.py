"""Tiny vision-language models from their config classes, each with its real processor class, as folders of files.

Nothing is downloaded: the tokenizer has one token a byte and the family's own special tokens, the image processors are
the real classes (their PIL form) with small sizes, and the chat template is one of ours around the family's image slot.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from dso.models.processor import images_only

PLAIN = ("<pad>", "<eos>", "<bos>")
FIRST = len(PLAIN) + 256  # the number of the first special token of a family
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.3,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8, "initializer_range": 0.3,
}  # fmt: skip
SIGLIP = TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
MROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Family:
    """How one architecture's tiny model and processor are made.

    Attributes:
        config: class name and settings of the model's config; text settings gain the vocabulary's size.
        processor, images: class names and settings of the processor and of its image part.
        special: the tokens that the family adds, by the name that its tokenizer gives them.
        slot: what the chat template writes for an image.
        adjust: what is done to the fresh model, so that every part of it matters.
    """

    config: tuple[str, dict[str, Any]]
    processor: tuple[str, dict[str, Any]]
    images: tuple[str, dict[str, Any]]
    special: dict[str, str]
    slot: str = "<image>"
    adjust: Callable[[torch.nn.Module], None] = field(default=lambda model: None)


WITH_VIDEO = ("LLaVA-OneVision", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "SmolVLM", "InternVL")


def token(number: int) -> int:
    """The id of the family's special token of that place in its list."""
    return FIRST + number


def open_gates(model: torch.nn.Module) -> None:
    """Mllama starts with its cross attention shut; here it counts."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.7)


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


QWEN_TOKENS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
}  # fmt: skip
QWEN_IDS = dict(zip(["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"],
                    map(token, range(4)), strict=True))  # fmt: skip
QWEN_SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_IMAGES = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 512}}
QWEN2 = TEXT | {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}}
IDEFICS_TOKENS = {
    "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>", "video_token": "<video>",
} | {f"row_{r}_col_{c}": f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)}  # fmt: skip
IDEFICS_IMAGES = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
GEMMA3 = TEXT | {
    "model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "LLaVA": Family(
        config=(
            "LlavaConfig",
            {
                "text_config": TEXT | {"model_type": "llama"},
                "vision_config": TOWER | {"model_type": "clip_vision_model"},
                "image_token_index": token(0),
            },
        ),
        processor=(
            "LlavaProcessor",
            {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        ),
        images=("CLIPImageProcessorPil", {"size": {"shortest_edge": 16}, "crop_size": square(16)}),
        special={"image_token": "<image>"},
    ),
    "LLaVA-OneVision": Family(
        config=(
            "LlavaOnevisionConfig",
            {
                "text_config": TEXT | {"model_type": "qwen2"},
                "vision_config": SIGLIP,
                "image_token_index": token(0),
                "video_token_index": token(1),
                "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16], [32, 32]],
            },
        ),
        processor=("LlavaOnevisionProcessor", {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}),
        images=(
            "LlavaOnevisionImageProcessorPil",
            {"size": square(16), "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16], [32, 32]]},
        ),
        special={"image_token": "<image>", "video_token": "<video>"},
    ),
    "Qwen2-VL": Family(
        config=(
            "Qwen2VLConfig",
            {
                "text_config": QWEN2,
                "vision_config": {
                    "depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2,
                    "initializer_range": 0.3,
                },
                **QWEN_IDS,
            },
        ),
        processor=("Qwen2VLProcessor", {}),
        images=("Qwen2VLImageProcessorPil", QWEN_IMAGES),
        special=QWEN_TOKENS,
        slot=QWEN_SLOT,
    ),
    "Qwen2.5-VL": Family(
        config=(
            "Qwen2_5_VLConfig",
            {
                "text_config": QWEN2,
                "vision_config": {
                    "depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "patch_size": 4,
                    "intermediate_size": 16, "window_size": 16, "fullatt_block_indexes": [1], "initializer_range": 0.3,
                },
                **QWEN_IDS,
            },
        ),
        processor=("Qwen2_5_VLProcessor", {}),
        images=("Qwen2VLImageProcessorPil", QWEN_IMAGES),
        special=QWEN_TOKENS,
        slot=QWEN_SLOT,
    ),
    "Qwen3-VL": Family(
        config=(
            "Qwen3VLConfig",
            {
                "text_config": TEXT
                | {"head_dim": 8, "rope_parameters": MROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}},
                "vision_config": {
                    "depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "patch_size": 4,
                    "intermediate_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
                    "initializer_range": 0.3,
                },
                **QWEN_IDS,
            },
        ),
        processor=("Qwen3VLProcessor", {}),
        images=("Qwen2VLImageProcessorPil", QWEN_IMAGES),
        special=QWEN_TOKENS,
        slot=QWEN_SLOT,
    ),
    "Gemma3-VL": Family(
        config=(
            "Gemma3Config",
            {
                "text_config": GEMMA3,
                "vision_config": SIGLIP | {"image_size": 32},
                "mm_tokens_per_image": 4,
                "image_token_index": token(0),
                "boi_token_index": token(1),
                "eoi_token_index": token(2),
            },
        ),
        processor=("Gemma3Processor", {"image_seq_length": 4}),
        images=("Gemma3ImageProcessorPil", {"size": square(32)}),
        special={
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        },
        slot="<start_of_image>",
    ),
    "Mllama": Family(
        config=(
            "MllamaConfig",
            {
                "text_config": TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
                "vision_config": {
                    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_global_layers": 1,
                    "attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_output_dim": 32,
                    "intermediate_layers_indices": [0], "initializer_range": 0.3,
                },
                "image_token_index": token(0),
            },
        ),
        processor=("MllamaProcessor", {}),
        images=("MllamaImageProcessorPil", {"size": square(16)}),
        special={"image_token": "<|image|>", "python_token": "<|python_tag|>"},
        slot="<|image|>",
        adjust=open_gates,
    ),
    "Idefics3": Family(
        config=(
            "Idefics3Config",
            {
                "text_config": TEXT | {"model_type": "llama"},
                "vision_config": TOWER,
                "image_token_id": token(0),
            },
        ),
        processor=("Idefics3Processor", {"image_seq_len": 1}),
        images=("Idefics3ImageProcessorPil", IDEFICS_IMAGES),
        special=IDEFICS_TOKENS,
    ),
    "SmolVLM": Family(
        config=(
            "SmolVLMConfig",
            {
                "text_config": TEXT | {"model_type": "llama"},
                "vision_config": TOWER,
                "image_token_id": token(0),
            },
        ),
        processor=("SmolVLMProcessor", {"image_seq_len": 1}),
        images=("SmolVLMImageProcessorPil", IDEFICS_IMAGES),
        special=IDEFICS_TOKENS,
    ),
    "InternVL": Family(
        config=(
            "InternVLConfig",
            {
                "text_config": TEXT | {"model_type": "qwen2"},
                "vision_config": TOWER | {"image_size": [16, 16], "patch_size": [4, 4]},
                "image_token_id": token(0),
                "image_seq_length": 4,
            },
        ),
        processor=("InternVLProcessor", {"image_seq_length": 4}),
        images=("GotOcr2ImageProcessorPil", {"size": square(16), "max_patches": 4, "crop_to_patches": True}),
        special={
            "context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>",
            "video_token": "<video>",
        },
        slot="<IMG_CONTEXT>",
    ),
    "PaliGemma": Family(
        config=(
            "PaliGemmaConfig",
            {
                "text_config": TEXT | {"model_type": "gemma", "head_dim": 8},
                "vision_config": SIGLIP | {"projection_dim": 16},
                "image_token_index": token(0),
                "projection_dim": 16,
                "hidden_size": 16,
            },
        ),
        processor=("PaliGemmaProcessor", {}),
        images=("SiglipImageProcessorPil", {"size": square(16), "image_seq_length": 4}),
        special={"image_token": "<image>"},
    ),
}  # fmt: skip


def byte_tokenizer(special: dict[str, str]) -> PreTrainedTokenizerFast:
    """One token a byte, and the family's own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate([*PLAIN, *alphabet, *special.values()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.add_special_tokens(list(special.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens=special,
    )


CHAT_TEMPLATE = (
    "{{{{ bos_token }}}}{{% for m in messages %}}<{{{{ m['role'] }}}}>{{% for part in m['content'] %}}"
    "{{% if part['type'] == 'image' %}}{slot}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}"
    "{{% if not loop.last or add_generation_prompt %}}\n{{% endif %}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
)


def make_processor(name: str):
    """The family's processor, without a video part."""
    family = FAMILIES[name]
    images = getattr(transformers, family.images[0])(**family.images[1])
    kind = images_only(getattr(transformers, family.processor[0]))
    template = CHAT_TEMPLATE.format(slot=family.slot) if name != "PaliGemma" else None
    video = {"video_processor": None} if name in WITH_VIDEO else {}
    return kind(images, byte_tokenizer(family.special), chat_template=template, **video, **family.processor[1])


def make_model(name: str, tokens: int, seed: int = 0) -> torch.nn.Module:
    """A random model of the family with weights large enough that its answers differ."""
    family = FAMILIES[name]
    settings = copy.deepcopy(family.config[1])
    settings["text_config"]["vocab_size"] = tokens
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(getattr(transformers, family.config[0])(**settings)).eval()
    family.adjust(model)
    return model
