"""Samples of a policy: the one sampler of `trl-prime eval` and of the held-out measure, and vLLM in its place.

In `trl-prime eval` each sample has a seed of its own, so that a run that was interrupted goes on to the very samples it would
have had. Covered: transformers and vLLM, greedy decoding and sampling in one batch. Not covered: several processes (vLLM
brings its own), tools.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import cached_file
from trl.trainer.utils import pad

from ..implicit_prm.loading import load_adapted_model, load_model
from ..texts import TextFormat, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class SamplingSettings:
    """
    How completions are sampled.

    Attributes:
        max_new_tokens: Longest completion in tokens.
        temperature: Temperature of the samples, positive. A seed of None asks for a greedy completion.
        top_p: Share of the probability that is kept.
        top_k: Number of tokens that are kept; 0 keeps all.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Sample:
    """
    One completion.

    Attributes:
        text: Without special tokens.
        num_tokens: With the one that ends it.
        truncated: Whether it was cut at the longest length.
    """

    text: str
    num_tokens: int
    truncated: bool


# A sampler takes prompts (text or messages) and a seed for each (None is greedy), and returns samples in their order
Sampler = Callable[[Sequence[Any], Sequence[int | None]], list[Sample]]


def sample_seed(seed: int, problem: int, sample: int) -> int:
    """Seed of one sample of one problem in a run with `seed`: 63 bits, far apart for neighbours."""
    return int(np.random.SeedSequence((seed, problem, sample)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class SeededSampling(LogitsProcessor):
    """
    Makes greedy decoding sample: the largest of log-probabilities plus Gumbel noise is an exact sample (the Gumbel-max
    trick). Each row has a random stream of its own, so its sample does not depend on the rows beside it, as it does in
    `generate(do_sample=True)`.

    Args:
        seeds (`list[int | None]` or `torch.Generator`): A seed for each row; a row with None stays greedy. Or one random stream
            for all rows, which then samples as `generate(do_sample=True)` does.
        device (`torch.device`): Where the logits are.
    """

    def __init__(self, seeds: Sequence[int | None] | torch.Generator, device: torch.device):
        # Each entry holds rows and the random stream that they draw from
        self.streams: list[tuple[slice | int, torch.Generator]] = [(slice(None), seeds)]
        if not isinstance(seeds, torch.Generator):
            seeded = [(row, seed) for row, seed in enumerate(seeds) if seed is not None]
            self.streams = [(row, torch.Generator(device).manual_seed(seed)) for row, seed in seeded]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.ones_like(scores)
        for rows, stream in self.streams:
            noise[rows].exponential_(generator=stream)
        return scores - noise.log()


class TransformersSampler:
    """
    Samples by `generate`.

    Args:
        model ([`~transformers.PreTrainedModel`]): The policy. Its generation defaults (a repetition penalty, for instance)
            do not count, as in training; its end-of-sequence tokens do. It is left as it was.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        settings ([`SamplingSettings`]): How to sample.
        text_format ([`~trl_prime.texts.TextFormat`], *optional*): How its run has rendered messages.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingSettings,
        text_format: TextFormat | None = None,
    ):
        ends = model.generation_config.eos_token_id
        self.ends = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
        self.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=self.ends or None,
            pad_token_id=_pad_token_id(tokenizer),
        )
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.text_format = text_format or TextFormat()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], seeds: Sequence[int | None] | torch.Generator) -> list[Sample]:
        """
        A completion for each prompt.

        Args:
            prompts (`list`): N prompts, text or messages.
            seeds (`list[int | None]` or `torch.Generator`): As in [`SeededSampling`].

        Returns:
            `list[Sample]`: N samples.
        """
        prompt_ids = [torch.tensor(encode_prompt(self.tokenizer, prompt, self.text_format)) for prompt in prompts]
        input_ids = pad(prompt_ids, self.generation_config.pad_token_id, "left").to(self.model.device)
        attention_mask = pad([torch.ones_like(ids) for ids in prompt_ids], 0, "left").to(self.model.device)
        processors = LogitsProcessorList([TemperatureLogitsWarper(self.settings.temperature)])
        if self.settings.top_k:
            processors.append(TopKLogitsWarper(self.settings.top_k))
        if self.settings.top_p < 1:
            processors.append(TopPLogitsWarper(self.settings.top_p))
        processors.append(SeededSampling(seeds, self.model.device))
        was_training, defaults = self.model.training, self.model.generation_config
        # `generate` fills the gaps of a configuration that it is given from the model's own, so this one takes its place
        self.model.eval().generation_config = self.generation_config
        try:
            ids = self.model.generate(input_ids=input_ids, attention_mask=attention_mask, logits_processor=processors)
        finally:
            self.model.train(was_training).generation_config = defaults
        samples = []
        for row in ids[:, input_ids.shape[1] :].tolist():
            length = next((i + 1 for i, token in enumerate(row) if token in self.ends), None)
            text = self.tokenizer.decode(row[:length], skip_special_tokens=True)
            samples.append(Sample(text, length or len(row), truncated=length is None))
        return samples


class VLLMSampler:
    """
    Samples by vLLM, which must be installed.

    Args:
        model_name_or_path (`str`): The policy, or a LoRA adapter of it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        settings ([`SamplingSettings`]): How to sample.
        text_format ([`~trl_prime.texts.TextFormat`], *optional*): How its run has rendered messages.
        **engine: Arguments of `vllm.LLM`.

    Raises:
        ValueError: vLLM is not installed, or the adapter is no LoRA.
    """

    def __init__(
        self,
        model_name_or_path: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingSettings,
        text_format: TextFormat | None = None,
        *,
        revision: str | None = None,
        **engine: Any,
    ):
        import vllm

        self.tokenizer = tokenizer
        self.settings = settings
        self.text_format = text_format or TextFormat()
        self.lora = None
        adapter = adapter_folder(model_name_or_path, revision)
        if adapter is not None:
            from peft import PeftConfig, PeftType
            from vllm.lora.request import LoRARequest

            config = PeftConfig.from_pretrained(adapter)
            if config.peft_type != PeftType.LORA:
                raise ValueError(
                    f"use_vllm is true, but the adapter is {config.peft_type.value}, and vLLM takes LoRA only. Leave use_vllm out, or "
                    "give the adapter merged into its base"
                )
            self.lora = LoRARequest("adapter", 1, str(adapter))
            model_name_or_path, revision = config.base_model_name_or_path, config.revision
            rank = max(8, config.r, *config.rank_pattern.values())
            # vLLM takes powers of two from 8 on
            engine |= {"enable_lora": True, "max_lora_rank": 1 << (rank - 1).bit_length()}
        self.engine = vllm.LLM(model=model_name_or_path, revision=revision, **engine)

    def __call__(self, prompts: Sequence[Any], seeds: Sequence[int | None]) -> list[Sample]:
        from vllm import SamplingParams

        requests = [
            {"prompt_token_ids": encode_prompt(self.tokenizer, prompt, self.text_format)} for prompt in prompts
        ]
        params = [
            SamplingParams(
                max_tokens=self.settings.max_new_tokens,
                **(
                    {"temperature": 0.0}
                    if seed is None
                    else {
                        "temperature": self.settings.temperature,
                        "top_p": self.settings.top_p,
                        "top_k": self.settings.top_k,
                        "seed": seed,
                    }
                ),
            )
            for seed in seeds
        ]
        samples = []
        for output in self.engine.generate(requests, params, lora_request=self.lora, use_tqdm=False):
            completion = output.outputs[0]
            text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            samples.append(Sample(text, len(completion.token_ids), completion.finish_reason == "length"))
        return samples


def load_tokenizer(model_name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy or of a LoRA adapter, which has its base model's if it brings none."""
    adapter = adapter_folder(model_name_or_path, revision)
    if adapter is not None and _cached(model_name_or_path, "tokenizer_config.json", revision) is None:
        from peft import PeftConfig

        config = PeftConfig.from_pretrained(adapter)
        model_name_or_path, revision = config.base_model_name_or_path, config.revision
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, revision=revision)
    tokenizer.pad_token_id = _pad_token_id(tokenizer)
    return tokenizer


def load_policy(
    model_name_or_path: str, revision: str | None = None, device_map: str | None = None, **model_init_kwargs: Any
) -> PreTrainedModel:
    """
    A policy for generating, on the GPU if there is one. A LoRA adapter is loaded with its base model and merged into it.

    Args:
        model_name_or_path (`str`): Folder or Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        device_map (`str`, *optional*): `"auto"` spreads the model over several GPUs.
        **model_init_kwargs: `dtype`, `attn_implementation`.

    Returns:
        [`~transformers.PreTrainedModel`]
    """
    if device_map is None:
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"revision": revision, "device_map": device_map, **model_init_kwargs}
    adapter = adapter_folder(model_name_or_path, revision)
    if adapter is None:
        return load_model(model_name_or_path, **settings)
    return load_adapted_model(adapter, **settings).merge_and_unload()


def adapter_folder(model_name_or_path: str, revision: str | None = None) -> Path | None:
    """The local folder of a LoRA adapter, downloaded if it is on the Hub; None if it is a whole model."""
    found = _cached(model_name_or_path, "adapter_config.json", revision)
    if found is None or Path(model_name_or_path).is_dir():
        return None if found is None else Path(found).parent
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_name_or_path, revision=revision, allow_patterns=["adapter_*"]))


def _cached(name_or_path: str, filename: str, revision: str | None) -> str | None:
    return cached_file(
        name_or_path,
        filename,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
