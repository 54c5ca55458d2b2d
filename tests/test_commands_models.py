"""Models and data sets that a command cannot have: one sentence with option, value and remedy, before anything is loaded."""

import json
import shutil
import socket

import pytest
from conftest import build_model
from datasets import config
from huggingface_hub import constants, hf_hub_download

from trl_prime import ImplicitPRM, load_prime_dataset
from trl_prime.cli import main
from trl_prime.commands.models import TOKENIZER_FILES, check_model, check_prm

TRAINING = ["--output_dir", "run", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
# Each command with a name that it gets from the Hub, and what is there already
COMMANDS = {
    "train": ("model_name_or_path", ["train", *TRAINING, "--dataset_name", "ROWS"]),
    "train, PRM": (
        "prm_model_name_or_path",
        ["train", *TRAINING, "--model_name_or_path", "MODEL", "--dataset_name", "ROWS"],
    ),
    "train, data": ("dataset_name", ["train", *TRAINING, "--model_name_or_path", "MODEL"]),
    "prm": ("model_name_or_path", ["prm", *TRAINING, "--dataset_name", "ROWS"]),
    "prm, data": ("dataset_name", ["prm", *TRAINING, "--model_name_or_path", "MODEL"]),
    "eval": ("model_name_or_path", ["eval", "--dataset_name", "ROWS"]),
    "eval, PRM": ("prm_name_or_path", ["eval", "--model_name_or_path", "MODEL", "--dataset_name", "ROWS"]),
    "eval, data": ("dataset_name", ["eval", "--model_name_or_path", "MODEL"]),
    "score": ("prm_name_or_path", ["score", "--prompt", "a", "--completion", "b"]),
    "score, reference": ("reference", ["score", "--prm_name_or_path", "MODEL", "--prompt", "a", "--completion", "b"]),
    "data": ("dataset_name", ["data", "show"]),
    "data, tokenizer": ("tokenizer", ["data", "show", "ROWS"]),
}


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """The Hub is at a port where nobody listens, and nothing is in the cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return url


def said(command, capsys, model_path, tmp_path, name="no/such"):
    """Option of a command and the sentence about the name that it was given."""
    option, words = COMMANDS[command]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1+1=", "completion": "2", "label": True}) + "\n")
    words = [{"MODEL": model_path, "ROWS": str(rows)}.get(word, word) for word in words]
    capsys.readouterr()
    assert main([*words, f"--{option}", name]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return option, lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_not_in_the_cache_offline(command, capsys, model_path, tmp_path):
    option, sentence = said(command, capsys, model_path, tmp_path)
    assert sentence.startswith(f"trl-prime: {option} is 'no/such', which is neither a local ")
    assert "HF_HUB_OFFLINE" in sentence and "give a local " in sentence


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hub_that_refuses_the_connection(command, capsys, model_path, tmp_path, refused):
    option, sentence = said(command, capsys, model_path, tmp_path)
    assert sentence.startswith(f"trl-prime: {option} is 'no/such', which is neither a local ")
    assert f"{refused} cannot be reached" in sentence and "Mend the connection" in sentence


@pytest.mark.parametrize("command", ["eval", "data"])
def test_what_the_hub_does_not_have(command, capsys, model_path, tmp_path, hub):
    option, sentence = said(command, capsys, model_path, tmp_path)
    assert sentence.startswith(f"trl-prime: {option} is 'no/such', which is neither a local ")
    assert "that the Hub lets you read. Mend the name" in sentence
    option, sentence = said(command, capsys, model_path, tmp_path, name="runs/of/mine")
    assert "nor a name on the Hub, OWNER/NAME" in sentence


def test_what_is_on_the_hub_or_in_its_cache_is_let_through(hub, monkeypatch):
    hub.requests.clear()
    check_model("model", "me/base")
    assert hub.requests == [("HEAD", "/me/base/resolve/main/config.json", "me")]
    with pytest.raises(ValueError, match="model is 'me/base', .* not in the revision 'old'"):
        check_model("model", "me/base", "old")
    # A repo that only holds a PRM has no config.json; a Hub that is busy is asked again by the download
    hub.commit("me/base", "main", "another", {"prm/implicit_prm.json": b"{}"})
    check_model("model", "me/base")
    hub.faults.append(("HEAD", "config.json", 503))
    check_model("model", "me/base")
    hub.faults.clear()
    # Once it is in the cache, neither is asked
    hf_hub_download("me/base", "prm/implicit_prm.json")
    hub.requests.clear()
    check_model("model", "me/base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_model("model", "me/base")
    assert not hub.requests
    with pytest.raises(ValueError, match="nor in the cache"):
        check_model("tokenizer", "me/base", filenames=TOKENIZER_FILES)


def test_a_data_set_that_was_loaded_before_needs_no_hub(monkeypatch, tmp_path):
    """`datasets` keeps what it has prepared under the name; whether it can be loaded again is its affair."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="dataset_name is 'me/rows', .* nor in the cache"):
        load_prime_dataset("me/rows")
    (tmp_path / "me___rows" / "default" / "0.0.0" / "hash").mkdir(parents=True)
    loaded = []
    monkeypatch.setattr("trl_prime.data.adapters.load_dataset", lambda path, **kwargs: loaded.append(path) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_prime_dataset("me/rows")
    assert loaded == ["me/rows"]


def test_a_folder_without_a_model(tmp_path, capsys, model_path):
    (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-100").mkdir()
    assert main(["score", "--prm_name_or_path", str(tmp_path / "run"), "--prompt", "a", "--completion", "b"]) == 2
    sentence = capsys.readouterr().err
    assert f"prm_name_or_path is '{tmp_path / 'run'}', a folder without config.json or " in sentence
    assert f"last checkpoint is '{tmp_path / 'run' / 'checkpoint-100'}'" in sentence
    check_model("model", model_path)
    check_model("model", None)


def test_a_prm_whose_reference_is_not_known_or_not_there(tmp_path, tokenizer, capsys, model_path):
    """`eval` would find out only after it has sampled."""
    folder = str(tmp_path / "prm")
    reference = build_model(2).requires_grad_(False)
    ImplicitPRM(build_model(1), reference, tokenizer).save_pretrained(folder)
    arguments = {"option": "prm", "name": folder, "reference_option": "ref"}
    check_prm(**arguments)
    path = tmp_path / "prm" / "implicit_prm.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "reference": "no/such"}))
    with pytest.raises(ValueError, match=f"prm is '{folder}', but its reference is 'no/such', .* Or give ref"):
        check_prm(**arguments)
    check_prm(**arguments, reference=model_path)
    path.write_text(json.dumps({**saved, "reference": None}))
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "1+1=", "solution": "2"}) + "\n")
    flags = ["--model_name_or_path", model_path, "--prm_name_or_path", folder, "--dataset_name", str(data)]
    assert main(["eval", *flags, "--output_dir", str(tmp_path / "out")]) == 2
    assert "does not name its reference model. Give prm_reference" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", b""])
def test_weights_that_cannot_be_read(model_path, tmp_path, content):
    folder = tmp_path / "model"
    shutil.copytree(model_path, folder)
    check_model("model", str(folder))
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(
        ValueError, match=f"model is '{folder}', but its weights in 'model.safetensors' .*git lfs pull"
    ):
        check_model("model", str(folder))


def test_a_folder_without_a_tokenizer(model_path, tmp_path):
    folder = tmp_path / "model"
    build_model().save_pretrained(folder)
    with pytest.raises(ValueError, match=r"a folder without a tokenizer.*save_pretrained\("):
        check_model("model", str(folder))
    check_model("reference", str(folder), needs_tokenizer=False)
    check_model("model", model_path)


@pytest.mark.parametrize("settings", [{"attn_implementation": "nope"}, {"device_map": "nope"}])
def test_what_a_library_refuses_while_eval_loads_is_a_sentence(settings, model_path, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "1+1=", "solution": "2"}) + "\n")
    flags = {"model_name_or_path": model_path, "dataset_name": data, "output_dir": tmp_path / "out", **settings}
    assert main(["eval", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]) == 1
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith(f"trl-prime: model_name_or_path is '{model_path}', which could not be loaded: ")
