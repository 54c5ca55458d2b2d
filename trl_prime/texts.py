"""Prompts and completions: what is text, what is messages, and the token ids that models read.

Covered: the text of a completion, prompts rendered as in the PRM's training, the token that ends a completion, and the text
that each token adds. Not covered: a sampled completion need not be what the tokenizer makes of its text; ids are those of
the text.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

# Content that no chat template changes
_CONTENT = "4"
# `parse_response` of transformers moves these out of a message's content
_PARSED = ("tool_calls", "reasoning_content", "reasoning", "thinking")


@dataclasses.dataclass
class TextFormat:
    """
    How the rollouts of a run are written, so that their text becomes the same token ids again. Saved with the PRM.

    Attributes:
        chat_template_kwargs (`dict`): Further arguments of `apply_chat_template`, as JSON has them.
        turn_end_id (`int`, *optional*): The token that ends an answer to messages; `None` means the tokenizer's
            end-of-sequence token, which ends an answer to text in any case.
        messages (`bool`, *optional*): Whether prompts are messages; `None` where no run has shown it.
        content_blocks (`bool`): Whether the chat template is a processor's, which reads contents as lists of blocks.
    """

    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    turn_end_id: int | None = None
    messages: bool | None = None
    content_blocks: bool = False

    def __post_init__(self):
        try:
            json.dumps(self.chat_template_kwargs)
        except TypeError as error:
            raise ValueError(
                f"chat_template_kwargs is {self.chat_template_kwargs!r}, which could not be saved with the PRM ({error}): use "
                "what JSON has."
            ) from error

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, end_token_ids: Sequence[int], **settings: Any) -> TextFormat:
        """
        The format of rollouts that end at any of some tokens.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
            end_token_ids (`list[int]`): Where generation ends a completion, beside the tokenizer's end-of-sequence token.
            **settings: The other attributes.

        Returns:
            [`TextFormat`]: with the first of these tokens that the chat template writes after an answer, `<end_of_turn>` of
            Gemma, as the token that ends an answer.
        """
        text_format = cls(**settings)
        ends = {*end_token_ids, tokenizer.eos_token_id} - {None}
        after = text_format._after_an_answer(tokenizer)
        text_format.turn_end_id = next((i for i in after if i in ends), None)
        return text_format

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], **kwargs: Any) -> Any:
        """Render messages by `apply_chat_template`: the text, or with `tokenize=True` its token ids."""
        if self.content_blocks:
            from trl.data_utils import prepare_multimodal_messages

            messages = prepare_multimodal_messages(list(messages))
        return tokenizer.apply_chat_template(messages, **{"tokenize": False, **self.chat_template_kwargs, **kwargs})

    def _after_an_answer(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids that the chat template writes after the content of an assistant's message."""
        turns = [{"role": role, "content": _CONTENT} for role in ("user", "assistant")]
        try:
            rendered = self.render(tokenizer, turns)
        except Exception:  # templates raise what they like, or there is none
            return []
        _, found, after = rendered.rpartition(_CONTENT)
        return tokenizer(after, add_special_tokens=False).input_ids if found else []


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], text_format: TextFormat) -> list[int]:
    """
    Token ids of a prompt, as the policy is given it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        prompt (`str` or `list[dict]`): Text, or messages, which the chat template renders with the beginning of the answer.
        text_format ([`TextFormat`]): How messages are rendered.

    Returns:
        `list[int]`: the ids.

    Raises:
        ValueError: The prompt has images, which a tokenizer knows nothing of.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    if shown_images(prompt):
        raise ValueError(
            "A prompt has images, and text only is read here. Leave such prompts out, or score them by an ImplicitPRM that has the "
            "processor of its model: ImplicitPRM.score."
        )
    # A chat template writes its own special tokens
    rendered = text_format.render(tokenizer, prompt, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False).input_ids


def shown_images(prompt: str | list[dict]) -> list[Any]:
    """The images in the blocks of messages, in order."""
    contents = [] if isinstance(prompt, str) else [message.get("content") for message in prompt]
    blocks = [block for content in contents if isinstance(content, (list, tuple)) for block in content]
    return [block.get("image") for block in blocks if isinstance(block, dict) and block.get("type") == "image"]


def encode_shown_prompt(processor: ProcessorMixin, prompt: list[dict], text_format: TextFormat) -> BatchFeature:
    """
    What a model reads of a prompt with images, as the policy is given it.

    Args:
        processor ([`~transformers.ProcessorMixin`]): The processor.
        prompt (`list[dict]`): Messages, with the images in blocks `{"type": "image", "image": ...}`.
        text_format ([`TextFormat`]): How messages are rendered.

    Returns:
        [`~transformers.BatchFeature`]: of one row, without padding.
    """
    rendered = text_format.render(processor.tokenizer, prompt, add_generation_prompt=True)
    # A chat template writes its own special tokens
    return processor(images=[shown_images(prompt)], text=[rendered], return_tensors="pt", add_special_tokens=False)


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict],
    completion: str | list[dict],
    text_format: TextFormat,
    truncated: bool = False,
) -> tuple[list[int], list[int]]:
    """
    Token ids of a prompt and of its completion, each by itself, as the policy is given the one and writes the other.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the PRM.
        prompt (`str` or `list[dict]`): Text, or messages, which the chat template renders.
        completion (`str` or `list[dict]`): Text, or one assistant message. The token that ends it is appended unless it is
            there.
        text_format ([`TextFormat`]): How messages are rendered and turns end.
        truncated (`bool`): Whether the completion was cut off, so that no token ends it.

    Returns:
        `tuple[list[int], list[int]]`: ids of the prompt and of the completion.

    Raises:
        ValueError: The completion is no text and not one assistant message whose content is all of it.
    """
    if not isinstance(completion, str) and len(completion) != 1:
        raise ValueError(
            f"A completion must be text or one assistant message, but has {len(completion)} messages. Give turns one at a time, "
            "with the turns before in the prompt."
        )
    ids, _ = tokenize_turns(tokenizer, prompt, completion, text_format, truncated)
    return encode_prompt(tokenizer, prompt, text_format), ids


def tokenize_turns(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict],
    completion: str | list[dict],
    text_format: TextFormat,
    truncated: bool = False,
) -> tuple[list[int], list[bool]]:
    """
    Token ids of a completion, as [`tokenize`] has them, which may have several turns of the policy with what it was told between
    them.

    Args:
        completion (`str` or `list[dict]`): Text, or messages, the first of them the assistant's. After messages the chat
            template writes what others say, as TRL has it write what tools say; after a text it stands as it is.
        tokenizer, prompt, text_format, truncated: as in [`tokenize`]. The last turn is the one that was cut off.

    Returns:
        `tuple[list[int], list[bool]]`: ids of the completion, and whether the policy wrote each of them.

    Raises:
        ValueError: The completion is no text and does not begin with an assistant's message, or one of the assistant's
            messages has more than its content, or the chat template cannot be cut between messages.
    """
    messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    if not messages or messages[0].get("role") != "assistant":
        raise ValueError("A completion must be text or messages of which the first is the assistant's.")
    end = None if isinstance(prompt, str) else text_format.turn_end_id
    end = tokenizer.eos_token_id if end is None else end
    ids: list[int] = []
    written: list[bool] = []
    for is_policy, run in itertools.groupby(messages, lambda message: message["role"] == "assistant"):
        run = list(run)
        if is_policy:
            parsed = next((name for message in run for name in _PARSED if message.get(name)), None)
            if parsed is not None:
                raise ValueError(
                    f"A completion has {parsed!r} beside its content, and how the policy wrote that cannot be told. Give what "
                    "it wrote as text."
                )
            part = tokenizer("".join(message["content"] for message in run), add_special_tokens=False).input_ids
            cut_off = truncated and run[-1] is messages[-1]
            if not cut_off and end is not None and part[-1:] != [end]:
                part = [*part, end]
        elif isinstance(prompt, str):
            part = tokenizer("".join(message["content"] for message in run), add_special_tokens=False).input_ids
        else:
            part = _told_ids(tokenizer, run, text_format, end)
        ids += part
        written += [is_policy] * len(part)
    return ids, written


def _told_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], text_format: TextFormat, end: int | None
) -> list[int]:
    """What the chat template writes from the end of the policy's turn to the beginning of its next one."""
    before = [{"role": "user", "content": _CONTENT}, {"role": "assistant", "content": _CONTENT}]
    turn, both = (
        tokenizer(text_format.render(tokenizer, turns, **kwargs), add_special_tokens=False).input_ids
        for turns, kwargs in ((before, {}), ([*before, *messages], {"add_generation_prompt": True}))
    )
    # Some templates write a line break after the token that ends a turn, which the policy does not write
    while turn and end in turn and turn[-1] != end:
        turn = turn[:-1]
    if both[: len(turn)] != turn:
        raise ValueError(
            "The chat template writes an assistant's message in another way once others follow it, so that what they say cannot be "
            "told from it. Give turns one at a time, with the turns before in the prompt."
        )
    return both[len(turn) :]


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """
    The text that each token adds to what stands before it. A token decoded alone would lack the space that decoders of
    SentencePiece (Llama 2, Mistral, Phi-3) take off the beginning of a text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        token_ids (`list[int]`): Tokens.

    Returns:
        `list[str]`: A text for each token.
    """
    unique = list(dict.fromkeys(token_ids))
    # Decoded after a neighbour that is the same for all, whose text is cut off again
    neighbour = tokenizer(_CONTENT, add_special_tokens=False).input_ids
    before, *after = tokenizer.batch_decode(
        [neighbour, *([*neighbour, i] for i in unique)], clean_up_tokenization_spaces=False
    )
    alone = tokenizer.batch_decode([[i] for i in unique], clean_up_tokenization_spaces=False)
    texts = {
        i: text.removeprefix(before) if text.startswith(before) else bare
        for i, text, bare in zip(unique, after, alone, strict=True)
    }
    return [texts[i] for i in token_ids]


def completion_text(completion: Any) -> str:
    """
    Extract the text of a completion.

    Args:
        completion (`str` or `list[dict]`): A text, or messages, of which the last one counts. Its content may be a text, a
            list of parts, or None.

    Returns:
        `str`: empty where there is no text.
    """
    content = completion
    if isinstance(completion, (list, tuple)):
        content = completion[-1].get("content") if completion else None
    if isinstance(content, (list, tuple)):
        parts = (part if isinstance(part, str) else part.get("text") for part in content)
        content = "".join(part for part in parts if part)
    return content or ""


def prompt_text(prompt: str | list[dict]) -> str:
    """The text of a prompt without a chat template: the contents of its messages with blank lines between them."""
    return prompt if isinstance(prompt, str) else "\n\n".join(completion_text([message]) for message in prompt)


def is_text_or_messages(prompt: Any) -> bool:
    """Whether a prompt can be rendered: text, or messages."""
    return isinstance(prompt, str) or (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt)
    )


def can_be_scored(completion: Any) -> bool:
    """Whether `ImplicitPRM.score` takes the completion: text, or messages of text of which the first is the assistant's."""
    if isinstance(completion, str):
        return True
    return (
        is_text_or_messages(completion)
        and completion[0]["role"] == "assistant"
        and all(isinstance(message["content"], str) for message in completion)
        and not any(message.get(name) for message in completion for name in _PARSED)
    )
