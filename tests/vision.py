"""Tiny vision-language models and their processors, built on the spot: each lays out its images in another way."""

import numpy as np
import torch
import transformers as hf
from conftest import build_tokenizer
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

CHARACTERS = "0123456789+=:\nabcdefghijklmnopqrstuvwxyz "
SPECIAL = (
    "<image>",
    "<video>",
    "<start>",
    "<end>",
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)),
)
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' }}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
VISION = {"hidden_size": 16, "intermediate_size": 32}
SIGLIP = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}


def vision_tokenizer(template):
    tokenizer = build_tokenizer(CHARACTERS)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = template
    for name, token in (("image", "<image>"), ("video", "<video>"), ("boi", "<start>"), ("eoi", "<end>")):
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


class QwenProcessor(ProcessorMixin):
    """What `Qwen2_5_VLProcessor` makes of images; that one wants a video processor, which needs torchvision."""

    image_token = "<image>"
    return_mm_token_type_ids = True

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token_id = tokenizer.image_token_id
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    replace_image_token = hf.Qwen2_5_VLProcessor.replace_image_token


def qwen_processor():
    tokenizer = vision_tokenizer(TEMPLATE.replace("IMAGE", "<start><image><end>"))
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    return QwenProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def gemma_processor():
    tokenizer = vision_tokenizer(TEMPLATE.replace("IMAGE", "<start>"))
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return hf.Gemma3Processor(images, tokenizer, tokenizer.chat_template, image_seq_length=4)


def idefics_processor():
    tokenizer = vision_tokenizer(TEMPLATE.replace("IMAGE", "<image>"))
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return hf.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)


def config(name, tokenizer):
    """The configuration of a tiny model for this tokenizer."""
    token = tokenizer.convert_tokens_to_ids
    text = {**TEXT, "vocab_size": len(tokenizer)}
    tokens = {
        "image_token_id": token("<image>"),
        "video_token_id": token("<video>"),
        "vision_start_token_id": token("<start>"),
        "vision_end_token_id": token("<end>"),
    }
    qwen = {**VISION, "depth": 2, "num_heads": 2, "patch_size": 4, "out_hidden_size": 16}
    if name == "qwen2.5-vl":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        return hf.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config={**qwen, "window_size": 16, "fullatt_block_indexes": [1]},
            **tokens,
        )
    if name == "qwen3-vl":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        return hf.Qwen3VLConfig(
            text_config={**text, "head_dim": 8, "rope_parameters": rope},
            # Features of both layers of the vision tower go into the first two layers of the language model
            vision_config={**qwen, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
            **tokens,
        )
    if name == "gemma3":
        return hf.Gemma3Config(
            text_config={**text, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
            vision_config={**SIGLIP, "image_size": 16},
            mm_tokens_per_image=4,
            boi_token_index=token("<start>"),
            eoi_token_index=token("<end>"),
            image_token_index=token("<image>"),
        )
    cls, language = {"idefics3": (hf.Idefics3Config, "llama"), "smolvlm": (hf.SmolVLMConfig, "llama")}[name]
    return cls(
        text_config={"model_type": language, **text},
        vision_config={**SIGLIP, "image_size": 16},
        image_token_id=token("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )


CLASSES = {
    "qwen2.5-vl": (hf.Qwen2_5_VLForConditionalGeneration, qwen_processor),
    "qwen3-vl": (hf.Qwen3VLForConditionalGeneration, qwen_processor),
    "gemma3": (hf.Gemma3ForConditionalGeneration, gemma_processor),
    "idefics3": (hf.Idefics3ForConditionalGeneration, idefics_processor),
    "smolvlm": (hf.SmolVLMForConditionalGeneration, idefics_processor),
}


def build_vision_model(name, seed=0, scale=3.0):
    """A model whose distributions are far from uniform and depend on the images, and its processor."""
    cls, make_processor = CLASSES[name]
    processor = make_processor()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config(name, processor.tokenizer)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)  # the projector of Gemma 3 begins as zeros
                elif parameter.ndim > 1:
                    parameter.mul_(scale)
    return model, processor


def picture(seed, height=16, width=16):
    """An image of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))
