"""A character-level tokenizer and an untrained model of 0.4 million parameters: no network is needed for either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

PAD_TOKEN, EOS_TOKEN, UNK_TOKEN = "<pad>", "<eos>", "<unk>"
SPECIAL_TOKENS = [PAD_TOKEN, EOS_TOKEN, UNK_TOKEN]


def build_tokenizer(characters: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a character-level tokenizer: one character, one token.

    Args:
        characters: The characters that the task writes; `SPECIAL_TOKENS` come before them.

    Returns:
        Tokenizer with distinct padding, end-of-sequence and unknown tokens, padding on the left. It adds no tokens of
        its own, and decoding gives back exactly the text. Other characters are dropped.
    """
    from transformers import Qwen2Tokenizer

    # Beside a Qwen2 model, AutoTokenizer loads a Qwen2Tokenizer whatever was saved, so this has to be one. Without
    # merges it is character-level; its vocabulary names a space and a newline the byte-level way.
    names = [*SPECIAL_TOKENS, *(character.replace(" ", "Ġ").replace("\n", "Ċ") for character in characters)]
    return Qwen2Tokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=[],
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    hidden_size: int = 96,
    num_layers: int = 3,
    num_heads: int = 4,
) -> Qwen2ForCausalLM:
    """Build an untrained model of about 0.4 million parameters (at the default sizes).

    Args:
        tokenizer: Gives the vocabulary size and the special token ids.
        seed: Seed of the initial weights; the global random state is left as it was.
        hidden_size: Width; a multiple of `2 * num_heads`.
        num_layers: Number of decoder layers.
        num_heads: Number of attention heads.

    Returns:
        Model in float32.

    Raises:
        ValueError: If `hidden_size` is not a multiple of `2 * num_heads`.
    """
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    if hidden_size % (2 * num_heads):
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of 2 * num_heads = {2 * num_heads}")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=512,
        # Both values are for a short context and a narrow model: with the usual 10000 and 0.02, training on right
        # demonstrations did not get beyond the first line in 650 steps.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model
