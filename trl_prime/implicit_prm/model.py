"""The implicit PRM: a causal LM and the reference it is measured against (PRIME, arXiv 2502.01456, section 2.1).

Covered: building the pair from a path, a Hub id, an instance or the policy, full or LoRA; scoring token ids and text;
saving and loading. Not covered: training (`updater.py`).

With LoRA the reference is the bare base model: a second module tree over the same `Parameter` objects, so it costs no
memory and no adapter is ever switched off and on.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import logging
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.utils import pad

from ..hub import cached_commit, create_repo, upload
from ..images import RowImages
from ..process_rewards import (
    aggregate_process_rewards,
    implicit_process_rewards,
    reward_positions,
    split_steps,
    turn_ids,
)
from ..texts import TextFormat, encode_prompt, encode_shown_prompt, shown_images, token_texts, tokenize_turns
from .adapters import QUANTIZED, check_adapter, check_base_frozen, with_adapter
from .copies import (
    bare_base,
    compute_head_in_float32,
    copied,
    has_float32_head,
    is_fresh,
    share_parameters,
)
from .files import CONFIG_NAME, local_folder, name_base, saved_prm_card
from .loading import load_adapter, load_model
from .logps import batch_completion_logps, check_scoring, evaluating, unwrapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from huggingface_hub import CommitInfo

logger = logging.get_logger(__name__)


def _vocab_size(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size


def _is_quantized(model: PreTrainedModel | PeftModel) -> bool:
    return getattr(unwrapped(model), "hf_quantizer", None) is not None


def _in_dtype(model: PreTrainedModel, dtype: str | torch.dtype) -> PreTrainedModel:
    """The model itself where it has this data type already or cannot be cast, else a copy."""
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or dtype == model.dtype or _is_quantized(model):
        return model
    return copy.deepcopy(model).to(dtype)


def end_token_ids(model: str | PreTrainedModel | PeftModel) -> list[int]:
    """Tokens at which the generation configuration of a model, or of one by name, ends a completion."""
    if isinstance(model, str):
        try:
            config = GenerationConfig.from_pretrained(model)
        except OSError:
            return []  # none was saved
    else:
        config = getattr(unwrapped(model), "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    return ids if isinstance(ids, list) else [ids] if ids is not None else []


@dataclasses.dataclass(frozen=True)
class ScoredCompletion:
    """
    What the implicit PRM thinks of one completion. Rewards are log-odds.

    Attributes:
        tokens (`list[str]`): The t tokens as text.
        token_rewards (`torch.Tensor`): `(t,)` process reward of each token.
        prm_logps, ref_logps (`torch.Tensor`): `(t,)` log-probability of each token in nats, under the PRM and under its
            reference. `token_rewards` is beta times their difference.
        steps (`list[str]`): The steps as text. The steps of a completion of several turns are the turns, each with what the
            policy was told after it, which has no reward.
        step_ids (`list[int]`): For each of the t tokens the index of its step in `steps`.
        step_rewards (`torch.Tensor`): `(n_steps,)` sum of the token rewards of each step.
        reward (`float`): Sum over the completion, q.
        probability (`float`): `sigmoid(q)`, the chance of a right outcome by the PRM.
    """

    tokens: list[str]
    token_rewards: torch.Tensor
    prm_logps: torch.Tensor
    ref_logps: torch.Tensor
    steps: list[str]
    step_ids: list[int]
    step_rewards: torch.Tensor
    reward: float
    probability: float


class ImplicitPRM:
    """
    Implicit process reward model: `beta * log(pi_phi / pi_ref)` per token.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): pi_phi.
        reference ([`~transformers.PreTrainedModel`], *optional*): pi_ref, frozen by the caller. `None` when its
            log-probabilities come from elsewhere (`prm_reference="policy"`); `score` then raises.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of both.
        beta (`float`): Reward per nat, positive.
        step_delimiter (`str`): What ends a reasoning step.
        micro_batch_size (`int`): Completions of one forward pass.
        reference_name (`str`, *optional*): Folder or Hub id that `reference` was loaded from and still equals: it is then
            saved by this name, else with its weights.
        reference_revision (`str`, *optional*): Commit on the Hub that it was loaded from.
        text_format ([`~trl_prime.texts.TextFormat`], *optional*): How text becomes the token ids that the PRM is
            trained on. Not given, prompts are rendered by the bare chat template.
        processor ([`~transformers.ProcessorMixin`], *optional*): What makes inputs of a vision-language model out of prompts with
            images.

    Raises:
        ValueError: `beta` is not positive, or model and reference differ in vocabulary or data type.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reference: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        beta: float = 0.05,
        step_delimiter: str = "\n",
        micro_batch_size: int = 8,
        reference_name: str | None = None,
        reference_revision: str | None = None,
        text_format: TextFormat | None = None,
        processor: ProcessorMixin | None = None,
    ):
        if beta <= 0:
            raise ValueError(f"beta is {beta}, but the reward scale must be positive. The paper uses 0.05.")
        if reference is not None and _vocab_size(model) != _vocab_size(reference):
            raise ValueError(
                f"The implicit PRM has a vocabulary of {_vocab_size(model)} tokens and its reference one of "
                f"{_vocab_size(reference)}. Their ratio has no meaning: use a reference of the same model family."
            )
        if reference is not None and not (_is_quantized(model) or _is_quantized(reference)):
            dtype, reference_dtype = unwrapped(model).dtype, unwrapped(reference).dtype
            if dtype != reference_dtype:
                raise ValueError(
                    f"The implicit PRM is {dtype} and its reference {reference_dtype}: they round differently, and their ratio "
                    "would be noise of some hundredths of a nat a token. Load both in one dtype, the PRM's."
                )
        self.model = model
        self.reference = reference
        self.tokenizer = tokenizer
        self.beta = beta
        self.step_delimiter = step_delimiter
        self.micro_batch_size = micro_batch_size
        self.reference_name = reference_name
        self.reference_revision = reference_revision
        if text_format is None:
            template = getattr(processor, "chat_template", None)
            text_format = TextFormat.of(
                tokenizer,
                end_token_ids(model),
                chat_template_kwargs={"chat_template": template} if template else {},
                content_blocks=processor is not None,
            )
        self.text_format = text_format
        self.processor = processor

    # --- Building ---

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        peft_config: PeftConfig | None = None,
        frozen_reference: bool = True,
        **kwargs: Any,
    ) -> ImplicitPRM:
        """
        Take `model` as the start of the PRM and as its reference.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Becomes the PRM and is trained in place. Of a
                `PeftModel` the reference is the bare base.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
            peft_config ([`~peft.PeftConfig`], *optional*): Train an adapter; the reference then costs nothing.
            frozen_reference (`bool`): False to keep no reference.
            **kwargs: `beta`, `step_delimiter`, `micro_batch_size`, `reference_name`, `text_format`, `processor`.

        Returns:
            [`ImplicitPRM`]
        """
        if isinstance(model, PeftModel):
            if peft_config is not None:
                raise ValueError("prm_model is a PeftModel already: leave prm_peft_config out, or pass the bare base.")
            check_adapter(model)
            reference = bare_base(model) if frozen_reference else None
        elif peft_config is not None:
            base = share_parameters(model.requires_grad_(False))
            reference = base if frozen_reference else None
            model = with_adapter(model, peft_config)
            check_base_frozen(base)
        else:
            quantized = next((name for name, p in model.named_parameters() if not p.is_floating_point()), None)
            if quantized is not None:
                raise ValueError(QUANTIZED)
            reference = copied(model).requires_grad_(False) if frozen_reference else None
            model.requires_grad_(True)
        return cls(model, reference, tokenizer, **kwargs)

    @classmethod
    def from_policy(
        cls,
        policy: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        peft_config: PeftConfig | None = None,
        frozen_reference: bool = True,
        **kwargs: Any,
    ) -> ImplicitPRM:
        """
        Start PRM and reference from the policy as it is now, as the paper does; the policy stays untouched.

        A policy with a fresh LoRA adapter shares its frozen base: with the reference always, and with the PRM too if that
        is LoRA. An adapter that was trained before is merged into a copy first, because it is part of the start model. Virtual
        tokens of prompt or prefix tuning cannot be merged: PRM and reference then start from the base.

        Args:
            policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The policy.
            tokenizer, peft_config, frozen_reference, **kwargs: as in [`ImplicitPRM.from_model`].

        Returns:
            [`ImplicitPRM`]
        """
        shared_base = None
        if isinstance(policy, PeftModel) and is_fresh(policy):
            shared_base = bare_base(policy)
        if shared_base is not None and peft_config is not None:
            return cls.from_model(
                shared_base, tokenizer, peft_config=peft_config, frozen_reference=frozen_reference, **kwargs
            )
        if peft_config is None and not all(p.is_floating_point() for p in policy.parameters()):
            raise ValueError(QUANTIZED)
        start = copied(policy if shared_base is None else shared_base)
        if isinstance(start, PeftModel):
            start = start.merge_and_unload()
        if shared_base is None or not frozen_reference:
            return cls.from_model(
                start, tokenizer, peft_config=peft_config, frozen_reference=frozen_reference, **kwargs
            )
        return cls(start.requires_grad_(True), shared_base, tokenizer, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        reference: str | PreTrainedModel | None = None,
        beta: float | None = None,
        step_delimiter: str | None = None,
        micro_batch_size: int = 8,
        trainable: bool = False,
        **model_init_kwargs: Any,
    ) -> ImplicitPRM:
        """
        Load a PRM that [`ImplicitPRM.save_pretrained`] or [`ImplicitPRM.push_to_hub`] wrote, or any causal LM trained as an
        implicit PRM elsewhere.

        Args:
            path_or_repo (`str`): Folder or Hub id of the PRM, or of a run whose `prm/` folder holds it. Of a run's repo,
                only that folder is downloaded.
            subfolder (`str`, *optional*): Where it is in there, such as `"last-checkpoint"`.
            revision (`str`, *optional*): Branch, tag or commit of the PRM's repo. The reference has its own, which is saved.
            token (`str` or `bool`, *optional*): Token of the Hub, for the PRM and for its reference.
            cache_dir (`str`, *optional*): Where downloads are kept, of both.
            reference (`str` or model, *optional*): The reference; needed where the PRM does not name its own. Of a model in
                another data type than the PRM's a copy is taken.
            beta (`float`, *optional*): Reward scale; defaults to the saved one, 0.05 where none is.
            step_delimiter (`str`, *optional*): Defaults to the saved one, a newline where none is.
            micro_batch_size (`int`): Completions of one forward pass.
            trainable (`bool`): Whether an adapter is loaded for training on.
            **model_init_kwargs: Passed to `from_pretrained` for both models, each of the class that its checkpoint names.
                Without `dtype`, or with `"auto"`, both are loaded in the one that the PRM was saved in: in two, their
                difference would be rounding.

        Returns:
            [`ImplicitPRM`]

        Raises:
            ValueError: The PRM does not name its reference, or its adapter does not fit the reference.
        """
        hub = {"token": token, "cache_dir": cache_dir}
        folder, saved = local_folder(path_or_repo, subfolder, reference is None, revision=revision, **hub)
        if reference is None and saved.get("reference") is None:
            raise ValueError(
                f"'{path_or_repo}' does not name its reference model. Pass `reference`: the model that the PRM started from."
            )
        dtype = model_init_kwargs.pop("dtype", None) or "auto"
        if saved.get("adapter"):
            model, dtype = None, saved.get("dtype", dtype) if dtype == "auto" else dtype
        else:
            model = load_model(folder, dtype=dtype, **model_init_kwargs)
            dtype = dtype if _is_quantized(model) else model.dtype
        reference_init_kwargs = {**model_init_kwargs, **hub, "architecture": saved.get("architecture")}
        if reference is None:
            reference = str(folder / "reference") if saved["reference"] == "reference" else saved["reference"]
            reference_init_kwargs["revision"] = saved.get("reference_revision")
        # Weights that came with the PRM are saved with it again; an instance may have been changed since it was loaded
        reference_name = reference_revision = None
        if isinstance(reference, str):
            reference_name = None if reference == str(folder / "reference") else reference
            try:
                reference = load_model(reference, dtype=dtype, **reference_init_kwargs)
            except OSError as error:
                raise OSError(
                    f"The reference model '{reference}' of the PRM '{path_or_repo}' could not be loaded. Pass `reference`: "
                    "the model that the PRM started from."
                ) from error
            reference_revision = reference_name and cached_commit(
                reference_name, reference_init_kwargs.get("revision"), cache_dir
            )
        else:
            reference = _in_dtype(reference, dtype)
        if model is None:
            model = load_adapter(share_parameters(reference), folder / "adapter", trainable)
        if saved.get("float32_head"):
            for part in (model, reference):
                compute_head_in_float32(part)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text_format = saved.get("text_format")
        return cls(
            model.eval(),
            reference.eval().requires_grad_(False),
            tokenizer,
            beta=saved.get("beta", 0.05) if beta is None else beta,
            step_delimiter=saved.get("step_delimiter", "\n") if step_delimiter is None else step_delimiter,
            micro_batch_size=micro_batch_size,
            reference_name=reference_name,
            reference_revision=reference_revision,
            text_format=None if text_format is None else TextFormat(**text_format),
            processor=AutoProcessor.from_pretrained(folder) if saved.get("processor") else None,
        )

    def use_settings(self, *, beta: float, step_delimiter: str, micro_batch_size: int) -> None:
        """Take the settings of a new run, with a warning where they change what the PRM's rewards mean."""
        for name, value in (("beta", beta), ("step_delimiter", step_delimiter)):
            if getattr(self, name) != value:
                logger.warning(
                    f"The implicit PRM has {name} {getattr(self, name)!r}, and this run replaces it by {value!r} of its "
                    "configuration. Set it there if that is not meant."
                )
        self.beta, self.step_delimiter, self.micro_batch_size = beta, step_delimiter, micro_batch_size

    def portable_reference_name(self) -> str | None:
        """
        `reference_name` if it is found on every machine, else `None`, and the reference is saved with its weights.

        It is if the reference was loaded from the Hub by it: its commit is known. Where there are no weights to save, because
        the reference is the policy of the rollouts, who loads the PRM has to pass `reference`, and a warning says so.
        """
        if self.reference_revision is not None:
            return self.reference_name
        if self.reference is None:
            logger.warning(
                "The PRM has no reference model of its own (prm_reference='policy') and started from a model that is not on the "
                "Hub: who loads it from there has to pass `reference`, the model to measure it against."
            )
        return None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str | None = None,
        commit_message: str = "Upload implicit PRM",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """
        Push the PRM to the Hub so that [`ImplicitPRM.from_pretrained`] loads it anywhere: as [`ImplicitPRM.save_pretrained`]
        writes it, with a model card, and with its reference's weights unless that is on the Hub itself.

        Args:
            repo_id (`str`): The repo, made if needed.
            subfolder (`str`, *optional*): Where in the repo, `"prm"` for that of its policy; there is no card then.
            commit_message (`str`): Message of the commit.
            private (`bool`, *optional*): Visibility of a new repo.
            token (`str`, *optional*): Token with write permission; the saved one if not given.
            revision (`str`, *optional*): Branch to push to, made if needed.
            create_pr (`bool`): Open a pull request instead of pushing.

        Returns:
            [`~huggingface_hub.CommitInfo`]
        """
        repo_id = create_repo(repo_id, token=token, private=private, revision=revision)
        prm = copy.copy(self)
        prm.reference_name = self.portable_reference_name()
        with tempfile.TemporaryDirectory() as folder:
            prm.save_pretrained(folder)
            if subfolder is None:
                saved_prm_card(folder, repo_id, revision=revision).save(Path(folder) / "README.md")
            return upload(
                folder,
                repo_id,
                path_in_repo=subfolder,
                commit_message=commit_message,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def reference_is_saved_in(self, path: str | os.PathLike) -> bool:
        """Whether saving to this folder writes the reference's weights, because no name will find it again."""
        if self.reference is None or self.reference_name is None:
            return self.reference is not None
        # A folder around this one is the run's own, where the policy is going to be saved over the reference
        return Path(self.reference_name).resolve() in Path(path).resolve().parents

    def save_pretrained(
        self,
        path: str | os.PathLike,
        weights: dict[str, torch.Tensor] | None = None,
        reference_weights: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """
        Write the PRM so that [`ImplicitPRM.from_pretrained`] loads it: weights (or `adapter/`), tokenizer and settings.

        The reference is saved by its `reference_name` if it has one, else with its weights in `reference/`.

        Args:
            path (`str`): Folder, made if needed.
            weights, reference_weights (`dict[str, torch.Tensor]`, *optional*): The weights, where the models themselves hold
                only a part of them.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        reference_name, revision = self.reference_name, self.reference_revision
        if self.reference_is_saved_in(path):
            self.reference.save_pretrained(path / "reference", state_dict=reference_weights)
            reference_name, revision = "reference", None
        elif reference_name is not None and os.path.isdir(reference_name):
            reference_name = os.path.abspath(reference_name)
        is_adapter = isinstance(self.model, PeftModel)
        name_base(self.model, to_hub=reference_name in (None, "reference"))
        # Not in the folder itself: Trainer would take an adapter there for one of the policy
        self.model.save_pretrained(path / "adapter" if is_adapter else path, state_dict=weights)
        # A processor has the tokenizer
        (self.tokenizer if self.processor is None else self.processor).save_pretrained(path)
        settings = {
            "beta": self.beta,
            "step_delimiter": self.step_delimiter,
            "adapter": is_adapter,
            "reference": reference_name,
            "reference_revision": revision,
            # An adapter's own files do not tell this of its base
            "architecture": type(unwrapped(self.model)).__name__.removeprefix("FSDP"),
            "dtype": str(unwrapped(self.model).dtype).removeprefix("torch."),
            "float32_head": has_float32_head(self.model),
            "text_format": dataclasses.asdict(self.text_format),
            "processor": self.processor is not None,
        }
        (path / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n")

    # --- Scoring ---

    @torch.no_grad()
    def check_scoring(self) -> None:
        """Raise unless the model's log-probabilities are independent of padding, see [`~trl_prime.implicit_prm.logps.check_scoring`]."""
        with evaluating(self.model):
            check_scoring(self.model)

    def log_probs(self, *batch: Any, **kwargs: Any) -> torch.Tensor:
        """
        Log-probabilities under the PRM, without gradient, at temperature 1.

        Args:
            *batch (`torch.Tensor`): prompt ids and mask `(B, P)` padded on the left, completion ids and mask `(B, T)` padded
                on the right; for a model that sees images [`~trl_prime.images.RowImages`] after them.
            **kwargs: `rows` and `num_passes` of [`~trl_prime.implicit_prm.logps.batch_completion_logps`].

        Returns:
            `torch.Tensor`: `(B, T)` float32 in nats, zero at padding.
        """
        return batch_completion_logps(self.model, *batch[:4], self.micro_batch_size, *batch[4:], **kwargs)

    def reference_log_probs(self, *batch: Any, **kwargs: Any) -> torch.Tensor:
        """Log-probabilities under the reference, as [`ImplicitPRM.log_probs`]."""
        if self.reference is None:
            raise ValueError("This PRM has no reference model: its reference log-probabilities come from the policy.")
        return batch_completion_logps(self.reference, *batch[:4], self.micro_batch_size, *batch[4:], **kwargs)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text that each token adds, for finding step delimiters and for showing."""
        return token_texts(self.tokenizer, token_ids)

    def step_ids(self, completion_ids: torch.Tensor) -> torch.Tensor:
        """`(B, T)` step number of every token of `(B, T)` completion ids, see [`~trl_prime.process_rewards.split_steps`]."""
        unique = completion_ids.unique().tolist()
        texts = dict(zip(unique, self.token_texts(unique), strict=True))
        steps = [split_steps([texts[i] for i in row], self.step_delimiter) for row in completion_ids.tolist()]
        return torch.tensor(steps, dtype=torch.long, device=completion_ids.device).view(completion_ids.shape)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        truncated: Sequence[bool] | None = None,
        images: Sequence[Sequence[Any] | None] | None = None,
    ) -> list[ScoredCompletion]:
        """
        Token and step rewards of completions given as text, read as the token ids that the PRM was trained on.

        Args:
            prompts (`list[str]` or `list[list[dict]]`): Prompts, text or messages, which the chat template renders as in the
                PRM's training. A PRM that was trained on messages is given messages. A single prompt, by itself, is that of
                all completions.
            completions (`list[str]` or `list[list[dict]]`): A completion for each prompt: text, or messages of text, which
                begin with the assistant's and may have several turns. The token that ends a turn is appended, as the policy
                writes it.
            truncated (`list[bool]`, *optional*): Which completions were cut off at their longest length and have no such
                token. None of them by default.
            images (`list[list]`, *optional*): The images of each prompt, as a data set has them in its column `images`. Prompts that
                are messages may have them in their blocks instead, `{"type": "image", "image": ...}`.

        Returns:
            `list[ScoredCompletion]`: one for each completion, in order.

        Raises:
            ValueError: The arguments are of different lengths, there are images and the PRM has no processor, or a completion is
                neither text nor messages of text that begin with the assistant's.
        """
        if isinstance(completions, str):
            raise ValueError("`completions` is a text: give a list, [completion].")
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], dict)):
            prompts = [prompts] * len(completions)
        if len(prompts) != len(completions):
            raise ValueError(f"Got {len(prompts)} prompts and {len(completions)} completions; one for each is needed.")
        truncated = [False] * len(prompts) if truncated is None else truncated
        if len(truncated) != len(completions):
            raise ValueError(f"Got {len(completions)} completions and {len(truncated)} values of `truncated`.")
        if images is not None and len(images) != len(completions):
            raise ValueError(f"Got {len(completions)} completions and {len(images)} lists of `images`.")
        if not prompts:
            return []
        if images is not None:
            prompts = [self._with_images(prompt, shown) for prompt, shown in zip(prompts, images, strict=True)]
        if self.text_format.messages and any(isinstance(prompt, str) for prompt in prompts):
            logger.warning_once(
                "The implicit PRM was trained on prompts that are messages and is given text, which it knows little of. Give "
                "messages: [{'role': 'user', 'content': ...}]."
            )
        device = next(self.model.parameters()).device
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        encoded = [self._encoded(prompt) for prompt in prompts]
        rows = [
            (ids, *tokenize_turns(self.tokenizer, prompt, completion, self.text_format, is_truncated))
            for (ids, _), prompt, completion, is_truncated in zip(
                encoded, prompts, completions, truncated, strict=True
            )
        ]
        batch = [
            tensor.to(device)
            for column, side in ((0, "left"), (1, "right"))
            for tensor in (
                pad([torch.tensor(row[column], dtype=torch.long) for row in rows], pad_id, side),
                pad([torch.ones(len(row[column]), dtype=torch.long) for row in rows], 0, side),
            )
        ]
        completion_ids = batch[2]
        mask = pad([torch.tensor(row[2], dtype=torch.bool) for row in rows], False, "right").to(device)
        features = [found for _, found in encoded]
        if any(found is not None for found in features):
            batch.append(RowImages.of_prompts(features))
        prm_logps, ref_logps = self.log_probs(*batch), self.reference_log_probs(*batch)
        rewards = implicit_process_rewards(prm_logps, ref_logps, mask, self.beta)
        turns = turn_ids(mask)
        step_ids = torch.where((turns > 0).any(1, keepdim=True), turns, self.step_ids(completion_ids))
        step_rewards = aggregate_process_rewards(rewards, mask, "step", step_ids)
        step_ends = reward_positions(mask, "step", step_ids)
        scored = []
        for row, (_, token_ids, _) in enumerate(rows):
            num_tokens = len(token_ids)
            texts, row_steps = self.token_texts(token_ids), step_ids[row, :num_tokens].tolist()
            steps: dict[int, str] = {}
            for text, step in zip(texts, row_steps, strict=True):
                steps[step] = steps.get(step, "") + text
            # A token that spans several delimiters leaves numbers out
            index = {step: i for i, step in enumerate(steps)}
            total = rewards[row].sum()
            scored.append(
                ScoredCompletion(
                    tokens=texts,
                    token_rewards=rewards[row, :num_tokens].cpu(),
                    prm_logps=prm_logps[row, :num_tokens].cpu(),
                    ref_logps=ref_logps[row, :num_tokens].cpu(),
                    steps=list(steps.values()),
                    step_ids=[index[step] for step in row_steps],
                    step_rewards=step_rewards[row, step_ends[row]].cpu(),
                    reward=total.item(),
                    probability=total.sigmoid().item(),
                )
            )
        return scored

    def _encoded(self, prompt: str | list[dict]) -> tuple[list[int], dict[str, torch.Tensor] | None]:
        """Token ids of a prompt, and what the processor makes of its images if it has any."""
        if not shown_images(prompt):
            return encode_prompt(self.tokenizer, prompt, self.text_format), None
        if self.processor is None:
            raise ValueError(
                "A prompt has images, but this PRM has no processor: it was not trained by a run with one. Pass `processor` to "
                "ImplicitPRM, or set its attribute, to that of the model that it started from."
            )
        encoded = encode_shown_prompt(self.processor, prompt, self.text_format)
        return encoded.pop("input_ids")[0].tolist(), encoded

    @staticmethod
    def _with_images(prompt: str | list[dict], images: Sequence[Any] | None) -> str | list[dict]:
        """Messages with images in their blocks, where TRL puts those of a data set."""
        if not images:
            return prompt
        if isinstance(prompt, str):
            raise ValueError("`images` belong to prompts that are messages: [{'role': 'user', 'content': ...}].")
        return prepare_multimodal_messages(prompt, images=list(images))
