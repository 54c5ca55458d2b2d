"""The Hub: whether a name can be loaded, model cards of a policy trained by PRIME and of its PRM, and how a folder gets there.

What a card says is a pure function of settings; [`add_policy_section`] alone writes a file. What is pushed, and when, is decided in `prime_trainer.py` (the policy, by
Trainer, and the PRM along with it) and in `ImplicitPRM.push_to_hub`.
"""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import (
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import logging

if TYPE_CHECKING:
    from collections.abc import Sequence

    from huggingface_hub import CommitInfo
    from transformers import TrainingArguments

    from .prime_config import PRIMEConfig

logger = logging.get_logger(__name__)

PAPER = {
    "title": "Process Reinforcement through Implicit Rewards",
    "id": "2502.01456",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{cui2025process,
            title        = {{Process Reinforcement through Implicit Rewards}},
            author       = {Ganqu Cui and Lifan Yuan and Zefan Wang and Hanbin Wang and others},
            year         = 2025,
            eprint       = {arXiv:2502.01456},
        }"""),
}
POLICY_TAGS = ["trl", "prime", "trl-prime"]
PRM_TAGS = ["trl-prime", "prime", "process-reward-model", "implicit-prm"]
PAPER_LINK = f"[{PAPER['title']}](https://huggingface.co/papers/{PAPER['id']})"
SECTION_START, SECTION_END = "<!-- trl-prime -->", "<!-- /trl-prime -->"
SETTINGS = (
    "advantage_estimator",
    "num_generations",
    "max_completion_length",
    "outcome_weight",
    "process_weight",
    "prm_trust_weighting",
    "process_reward_granularity",
    "process_reward_norm",
    "accuracy_low",
    "accuracy_high",
    "prm_update",
    "prm_num_epochs",
    "prm_replay_batches",
    "prm_replay_steps",
    "prm_loss_type",
    "prm_guess_rate",
    "prm_reference_weight",
    "prm_reference_centred",
    "prm_beta",
    "prm_learning_rate",
    "prm_reference",
    "learning_rate",
    "loss_type",
    "beta",
)


# --- Names ---


def check_reachable(
    option: str, name: str, filenames: Sequence[str], *, repo_type: str = "model", revision: str | None = None
) -> None:
    """
    Refuse the name of a model that is not in the cache and cannot be had from the Hub, or of a data set that cannot. One
    request finds out, without the retries of a download.

    Args:
        option (`str`): The option that has this value, for the message.
        name (`str`): The value, which is no local file or folder.
        filenames (`list[str]`): Files of which a model in the cache has one. The Hub is asked for the first, and a repo
            without it counts as reachable.
        repo_type (`str`): `"model"` or `"dataset"`.
        revision (`str`, *optional*): Branch, tag or commit.

    Raises:
        ValueError: The name is none of the Hub, the Hub has nothing of that name or revision for this user, or it cannot be
            reached.
    """
    kind = {"model": "model", "dataset": "data set"}[repo_type]
    local = {"model": "folder", "dataset": "file or folder"}[repo_type]
    said = f"{option} is {name!r}, which is"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{said} neither a local {local} nor a name on the Hub, OWNER/NAME. Mend it.") from error
    if repo_type == "model" and any(
        isinstance(try_to_load_from_cache(name, filename, revision=revision), str) for filename in filenames
    ):
        return
    if is_offline_mode():
        raise ValueError(
            f"{said} neither a local {local} nor in the cache, and HF_HUB_OFFLINE forbids to download it. Load it once without "
            f"HF_HUB_OFFLINE, or give a local {local}."
        )
    try:
        get_hf_file_metadata(hf_hub_url(name, filenames[0], repo_type=repo_type, revision=revision))
    except RevisionNotFoundError as error:
        raise ValueError(f"{said} on the Hub, but not in the revision {revision!r}. Mend it.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{said} neither a local {local} nor a {kind} that the Hub lets you read. Mend the name, or ask for access on its "
            "page and log in by `hf auth login`."
        ) from error
    except HfHubHTTPError:
        pass  # it has no such file, or the Hub is busy, for which a download tries again
    # The HTTP library differs between versions of huggingface_hub, and so do its errors
    except Exception as error:
        raise ValueError(
            f"{said} neither a local {local} nor in the cache, and the Hub at {constants.ENDPOINT} cannot be reached ({error}). "
            f"Mend the connection or HF_ENDPOINT, or give a local {local}."
        ) from error


# --- Cards ---


def settings_table(args: TrainingArguments, names: Sequence[str] = SETTINGS) -> str:
    """
    The settings of a run that its result depends on, as a Markdown table.

    Args:
        args ([`~transformers.TrainingArguments`]): The run's configuration.
        names (`list[str]`): Fields that it has; those of [`PRIMEConfig`] if not given.

    Returns:
        `str`: The table, by name of the field, without fields that are not set.
    """
    values = {name: getattr(args, name) for name in names}
    rows = [f"| `{name}` | {value} |" for name, value in values.items() if value is not None]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def prm_snippet(
    repo_id: str, revision: str | None = None, needs_reference: bool = False, messages: bool | None = None
) -> str:
    """
    Python code that loads a PRM and scores a completion with it.

    Args:
        repo_id (`str`): Repo of the PRM, or of the policy that it lies in.
        revision (`str`, *optional*): Branch that it was pushed to.
        needs_reference (`bool`): Whether the PRM does not know its reference, which the reader then has to name.
        messages (`bool`, *optional*): Whether it was trained on prompts that are messages.

    Returns:
        `str`: A fenced code block.
    """
    question = '"What is 7 * 8?"'
    prompt = f'[{{"role": "user", "content": {question}}}]' if messages else question
    arguments = f'"{repo_id}"{_revision_argument(revision)}'
    if needs_reference:
        arguments += ', reference="the model that it started from"'
    return textwrap.dedent(f"""\
        ```python
        from trl_prime import ImplicitPRM

        prm = ImplicitPRM.from_pretrained({arguments})
        # Prompts as in training: {"messages" if messages else "text"}
        (scored,) = prm.score([{prompt}], ["7 * 8 = 56\\nThe answer is 56."])
        for step, reward in zip(scored.steps, scored.step_rewards.tolist()):
            print(f"{{reward:+.3f}} {{step!r}}")
        print(f"chance of a right outcome: {{scored.probability:.1%}}")
        ```""")


def policy_snippet(repo_id: str, revision: str | None = None, bare_base: bool = False) -> str:
    """
    Python code that loads the policy.

    Args:
        repo_id (`str`): Repo of the policy.
        revision (`str`, *optional*): Branch that it was pushed to.
        bare_base (`bool`): Whether the policy is an adapter whose base model is not on the Hub.

    Returns:
        `str`: A fenced code block.
    """
    arguments = f'"{repo_id}"{_revision_argument(revision)}'
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({arguments})",
    ]
    if bare_base:
        lines.insert(0, "from peft import PeftModel")
        lines.append('base = AutoModelForCausalLM.from_pretrained("path/to/the/base/model")  # not on the Hub')
        lines.append(f"policy = PeftModel.from_pretrained(base, {arguments})")
    else:
        lines.append(f"policy = AutoModelForCausalLM.from_pretrained({arguments})")
    return "\n".join(["```python", *lines, "```"])


def _revision_argument(revision: str | None) -> str:
    return f', revision="{revision}"' if revision else ""


def policy_section(
    args: PRIMEConfig,
    repo_id: str,
    *,
    revision: str | None = None,
    bare_base: bool = False,
    prm_needs_reference: bool = False,
    messages: bool | None = None,
) -> str:
    """
    What PRIME adds to the card that TRL writes for a policy.

    Args:
        args ([`PRIMEConfig`]): The run's configuration.
        repo_id (`str`): Repo of the policy.
        revision (`str`, *optional*): Branch that it is pushed to.
        bare_base (`bool`): Whether the policy is an adapter whose base model is not on the Hub.
        prm_needs_reference (`bool`): Whether the PRM does not know its reference.
        messages (`bool`, *optional*): Whether prompts are messages.

    Returns:
        `str`: Markdown, between two comments by which [`with_section`] finds it again.
    """
    return "\n\n".join(
        [
            SECTION_START,
            "## PRIME",
            f"The policy was trained by PRIME ({PAPER_LINK}): reinforcement learning on outcomes and on the dense process "
            "rewards of an implicit PRM, a second language model that was trained along with the policy, on outcome "
            "labels only. That PRM is in the folder `prm/` of this repo.",
            settings_table(args),
            "### Use the policy",
            policy_snippet(repo_id, revision, bare_base),
            "### Use the implicit PRM",
            prm_snippet(repo_id, revision, prm_needs_reference, messages),
            "Rewards are log-odds: `beta * log(pi_prm / pi_reference)` per token, summed over a step or a completion.",
            SECTION_END,
        ]
    )


def with_section(card: str, section: str) -> str:
    """
    A card with PRIME's section before the citations, in place of the one that it has already.

    Args:
        card (`str`): Text of the card, as TRL writes it or with an earlier section.
        section (`str`): What [`policy_section`] returned.

    Returns:
        `str`: Text of the card.
    """
    marked = re.escape(SECTION_START) + ".*?" + re.escape(SECTION_END)
    card = re.sub(rf"\n*{marked}\n*", "\n\n", card, flags=re.DOTALL)
    before, heading, after = card.partition("\n## Citations")
    card = f"{before.rstrip()}\n\n{section}\n{heading}{after}"
    # TRL writes this of a base model that is a local folder or was built on the spot
    return card.replace("[None](https://huggingface.co/None)", "a model that is not on the Hub")


def add_policy_section(
    path: Path,
    args: PRIMEConfig,
    repo_id: str,
    *,
    is_adapter: bool,
    prm_needs_reference: bool = False,
    messages: bool | None = None,
) -> None:
    """
    Put PRIME's section into the card that TRL has written for a policy.

    Args:
        path (`Path`): The card.
        args ([`PRIMEConfig`]): The run's configuration.
        repo_id (`str`): Repo of the policy.
        is_adapter (`bool`): Whether the policy is an adapter.
        prm_needs_reference, messages: As in [`policy_section`].
    """
    section = policy_section(
        args,
        repo_id,
        revision=args.hub_revision,
        bare_base=is_adapter and ModelCard.load(path).data.base_model is None,
        prm_needs_reference=prm_needs_reference,
        messages=messages,
    )
    path.write_text(with_section(path.read_text(encoding="utf-8"), section), encoding="utf-8")


def prm_card(
    repo_id: str,
    *,
    beta: float,
    is_adapter: bool,
    reference: str | None,
    reference_revision: str | None = None,
    messages: bool | None = None,
    trained: str | None = None,
    settings: str | None = None,
    datasets: str | Sequence[str] | None = None,
    revision: str | None = None,
) -> ModelCard:
    """
    The card of an implicit PRM in a repo of its own.

    Args:
        repo_id (`str`): Its repo.
        beta (`float`): Reward per nat.
        is_adapter (`bool`): Whether it is an adapter of its reference.
        reference (`str`, *optional*): Hub id of its reference, `"reference"` if that lies in the repo, `None` if unknown.
        reference_revision (`str`, *optional*): Commit of the reference.
        messages (`bool`, *optional*): Whether it was trained on prompts that are messages.
        trained (`str`, *optional*): A sentence on how it was trained, if not by PRIME.
        settings (`str`, *optional*): Table of the run's settings.
        datasets (`str` or `list[str]`, *optional*): Hub ids of the training data.
        revision (`str`, *optional*): Branch that it was pushed to.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    base_model = None if reference == "reference" else reference
    data = ModelCardData(
        library_name="trl-prime",
        base_model=base_model,
        # Not to be guessed from the files: the adapter is in a folder
        base_model_relation=("adapter" if is_adapter else "finetune") if base_model else None,
        datasets=datasets,
        tags=list(PRM_TAGS),
    )
    if reference is None:
        of_reference = "a model that the PRM does not know: pass `reference`, the model that the PRM started from"
    elif base_model is None:
        of_reference = "the model in the folder `reference/` of this repo"
    else:
        of_reference = f"[{reference}](https://huggingface.co/{reference})"
        of_reference += f" at commit `{reference_revision}`" if reference_revision else ""
    if trained is None:
        trained = f"It was trained on outcome labels only, by PRIME ({PAPER_LINK})."
    parts = [
        f"# Implicit PRM {repo_id.split('/')[-1]}",
        "An implicit process reward model: a language model whose log-probabilities, measured against those of a reference "
        f"model, reward every token of a completion. It is no chat model: use it to score what another model wrote. {trained}",
        f"- Reward of a token: `beta * (log pi_prm - log pi_reference)`, with beta = {beta:g}. Sums over a step or a "
        "completion are log-odds: 0 is undecided, and the sigmoid of a completion's sum is the chance of a right outcome.\n"
        f"- The PRM is {'an adapter of its reference' if is_adapter else 'a full model'}.\n"
        f"- The reference is {of_reference}.",
        "## Use",
        prm_snippet(repo_id, revision, reference is None, messages),
    ]
    if settings:
        parts += ["## Training", settings]
    parts += ["## Citation", f"```bibtex\n{PAPER['citation']}\n```"]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def hub_dataset(name: str | None) -> str | None:
    """The data set's name for a card: none for a local file or folder, which means nothing elsewhere."""
    return None if name is None or os.path.exists(name) else name


def cached_commit(name: str, revision: str | None = None, cache_dir: str | os.PathLike | None = None) -> str | None:
    """
    The commit of a model that was loaded from the Hub. It is looked up in the cache only.

    Args:
        name (`str`): What it was loaded by.
        revision, cache_dir (`str`, *optional*): as it was loaded.

    Returns:
        `str`, *optional*: `None` if it was not loaded from the Hub, but from a folder.
    """
    if os.path.isdir(name):
        return None
    try:
        path = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    except HFValidationError:
        return None
    return Path(path).parent.name if isinstance(path, str) else None


# --- Uploads ---


def create_repo(
    repo_id: str, *, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> str:
    """
    Make a model repo on the Hub, and a branch in it, where they do not exist.

    Args:
        repo_id (`str`): Its name; without a namespace it is the user's own.
        token (`str`, *optional*): Token with write permission; the saved one if not given.
        private (`bool`, *optional*): Visibility of a new repo.
        revision (`str`, *optional*): The branch.

    Returns:
        `str`: The full name.
    """
    api = HfApi(library_name="trl-prime", token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    commit_message: str,
    path_in_repo: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Commit a folder to a repo that exists.

    Args:
        folder (`str`): The folder.
        repo_id (`str`): The repo.
        commit_message (`str`): Message of the commit.
        path_in_repo (`str`, *optional*): Where in the repo; its root if not given.
        token, revision (`str`, *optional*): as in [`create_repo`].
        create_pr (`bool`): Open a pull request instead.

    Returns:
        [`~huggingface_hub.CommitInfo`]
    """
    return HfApi(library_name="trl-prime", token=token).upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        path_in_repo=path_in_repo,
        revision=revision,
        create_pr=create_pr,
    )


def warn_of_failed_pushes(push: Any) -> None:
    """Warn of uploads in the background that have failed: Trainer does not look at their results."""
    for job in getattr(push, "jobs", []):
        if job.exception() is not None:
            logger.warning(
                f"A push to the Hub failed; training goes on, and the checkpoint is on disk. {job.exception()}"
            )
