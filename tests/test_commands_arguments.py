"""Files and flags: what is no field or no value is refused, values mean the same in both, the help fits a screen."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from typing import get_args, get_type_hints

import pytest

from trl_prime import OfflinePRMConfig
from trl_prime.cli import COMMANDS, main
from trl_prime.commands.arguments import ArgumentReader, help_text, parse_arguments
from trl_prime.commands.evaluate import EvalArguments
from trl_prime.commands.prm import OfflinePRMScriptArguments
from trl_prime.commands.train import _types


class Color(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Base:
    """
    Fields that others add to.

    Parameters:
        > Parameters that control the size

        width (`int`): Width.
        names (`list[str]`, *optional*): Names.
    """

    width: int = field(default=3, metadata={"help": "How wide. 100%% is all."})
    names: list[str] | None = field(default=None, metadata={"help": "Names."})


@dataclass
class Arguments(Base):
    """
    Of a command.

    Parameters:
        > Parameters that control the rate

        rate (`float`): Rate.
    """

    rate: float = field(default=0.5, metadata={"help": "How fast."})
    is_on: bool = field(default=True, metadata={"help": "Whether."})
    color: Color = field(default=Color.RED, metadata={"help": "Which color."})
    title: str | None = field(default=None, metadata={"help": "Title."})
    options: dict | str | None = field(default=None, metadata={"help": "Options."})
    strategy: str = field(default="no", metadata={"help": "One of two.", "choices": ["no", "steps"]})


def parse(tmp_path, text=None, *flags):
    words = list(flags)
    if text is not None:
        (tmp_path / "file.yaml").write_text(text)
        words = ["--config", str(tmp_path / "file.yaml"), *words]
    return parse_arguments([Arguments], words, "trl-prime test")[0]


@pytest.mark.parametrize(
    "line, flags",
    [
        ("rate: 1e-3", ["--rate", "1e-3"]),  # a text to YAML 1.1
        ("rate: 2", ["--rate", "2"]),
        ("width: 7", ["--width=7"]),
        ("names: a", ["--names", "a"]),
        ("names: [a, 1]", ["--names", "a", "1"]),
        ("is_on: false", ["--no_is_on"]),
        ("is_on: 0", ["--is-on", "0"]),
        ("color: blue", ["--color", "blue"]),
        ("title: 12", ["--title", "12"]),
        ("title: true", ["--title", "true"]),
    ],
)
def test_a_line_means_what_the_flag_means(tmp_path, line, flags):
    from_file, from_flags = parse(tmp_path, line), parse(tmp_path, None, *flags)
    assert from_file == from_flags != Arguments()
    name = line.split(":")[0]
    assert type(getattr(from_file, name)) is type(getattr(from_flags, name))


def test_words_before_the_flags_are_values_of_the_positional_fields():
    def words(*argv, positional=("title", "names")):
        return parse_arguments([Arguments], argv, "trl-prime test", positional=positional)[0]

    assert words("a", "b", "c", "--width", "7") == Arguments(title="a", names=["b", "c"], width=7)
    assert words("a") == Arguments(title="a")
    assert words("b", "c", positional=["names"]) == Arguments(names=["b", "c"])
    assert words() == Arguments()


def test_every_optional_field_can_be_emptied_by_a_flag(tmp_path):
    """`none` is no value where the hint of a field allows None, but where `none` is a word with a meaning (report_to)."""
    for types in (_types(), [EvalArguments], [OfflinePRMScriptArguments, OfflinePRMConfig]):
        reader = ArgumentReader(types, prog="trl-prime test", add_help=False)
        hints = {name: hint for cls in types for name, hint in get_type_hints(cls).items()}
        optional = [name for name in reader.fields if type(None) in get_args(hints[name])]
        assert len(optional) > 10
        for name in set(optional) - {"report_to"}:
            reader.set_defaults(**{name: ["what the recipe sets"]})
            for word in ("none", "None"):
                parsed, rest = reader.parse_known_args([f"--{name}", word])
                assert getattr(parsed, name) is None and not rest, name
        others = {name for name, hint in hints.items() if name in reader.fields and hint is str}
        for name in others:
            action = reader.fields[name]
            if not action.choices:
                assert getattr(reader.parse_known_args([f"--{name}", "none"])[0], name) == "none"
    reader = ArgumentReader(_types(), prog="trl-prime test", add_help=False)
    reader.set_defaults(report_to=["wandb"])
    assert reader.parse_known_args(["--report_to", "none"])[0].report_to == "none"


def test_none_is_no_value_in_flags_and_files(tmp_path):
    text = "title: a\nnames: [b]\noptions: {c: 1}\n"
    emptied = parse(tmp_path, text, "--title", "none", "--names", "none", "--options", "none")
    assert emptied == Arguments() == parse(tmp_path, "title: none\nnames: none\noptions: none\n")
    # Among other names it is one
    assert parse(tmp_path, text, "--names", "none", "x").names == ["none", "x"]
    with pytest.raises(ValueError, match="invalid int value: 'none'"):
        parse(tmp_path, "width: none")


def test_flags_win_and_the_rest_is_the_default(tmp_path):
    arguments = parse(tmp_path, "rate: 2.0\nwidth: 5\noptions: {a: 1}\ntitle: null\n", "--rate", "4")
    assert arguments == Arguments(rate=4.0, width=5, options={"a": 1})
    assert parse(tmp_path, "") == Arguments()


def test_environment_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIME_TEST", "")
    assert parse(tmp_path, "env: {PRIME_TEST: 7}\nwidth: 4").width == 4
    assert os.environ["PRIME_TEST"] == "7"


@pytest.mark.parametrize(
    "text, flags, said",
    [
        ("rat: 1", [], r"file.yaml sets 'rat', which is no field. Did you mean 'rate'\?"),
        (None, ["--rat", "1"], r"has no flag --rat. Did you mean 'rate'\?"),
        (None, ["--Rate=1"], r"has no flag --Rate. Did you mean 'rate'\?"),
        (None, ["--wid", "1"], r"has no flag --wid"),  # no silent abbreviations
        (None, ["stray"], r"can make nothing of 'stray'"),
        ("width: ten", [], r"file.yaml: argument --width: invalid int value: 'ten'"),
        ("width: 1.5", [], r"--width: invalid int value: '1.5'"),
        ("width: [1, 2]", [], r"sets width to \[1, 2\], but it takes a single value"),
        ("rate: {a: 1}", [], r"sets rate to \{'a': 1\}, but it takes a single value"),
        ("width:", [], r"leaves width empty"),
        ("is_on: perhaps", [], r"--is_on.*'?perhaps'?"),
        ("color: green", [], r"--color: invalid choice: 'green'"),
        ("strategy: no", [], r"--strategy: invalid choice: 'false'"),  # YAML 1.1 reads a bare `no` so
        (None, ["--width", "ten"], r"--width: invalid int value: 'ten'"),
        (None, ["--width"], r"--width: expected one argument"),
        (None, ["--config"], r"--config has no value"),
        (None, ["--config", "--width", "1"], r"--config has no value"),
        (None, ["--config", "missing.yaml"], r"missing.yaml of --config cannot be read: No such file"),
        (None, ["--config=missing.yaml"], r"missing.yaml of --config cannot be read"),
        (None, ["--config", "."], r"cannot be read: Is a directory"),
        ("width: 1", ["--config", "other.yaml"], r"--config is given twice"),
        ("a: [1", [], r"is no YAML: .*line 1"),
        ("- width", [], r"has to hold lines of `name: value`"),
        ("env: [1]", [], r"`env` of .* has to hold lines"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(tmp_path, monkeypatch, text, flags, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said) as error:
        parse(tmp_path, text, *flags)
    assert "\n" not in str(error.value)


def test_train_answers_with_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("learning_rate: fast\n")
    for words, said in (
        (["--config"], "--config has no value"),
        (["--config", "none.yaml"], "cannot be read"),
        (["--config", "recipe.yaml"], "invalid float value: 'fast'"),
        (["--prm_bata", "1"], "Did you mean 'prm_beta'?"),
        (["--help", "prm_bata"], "Did you mean 'prm_beta'?"),
        (["--task_kwargs", "{"], "task_kwargs is '{', which is no JSON"),
    ):
        assert main(["train", *words]) == 2
        printed = capsys.readouterr()
        assert said in printed.err and "Traceback" not in printed.err and not printed.out


@pytest.mark.parametrize("command", ["train", "data", "env"])
def test_help_fits_a_screen(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    assert lines[0].startswith(f"usage: trl-prime {command} ")


def test_short_help_of_train_has_the_fields_of_prime_by_group_with_defaults():
    text = " ".join(help_text(_types(), "trl-prime train").split())
    core = text.split("The core of PRIME: ")[1]
    assert core.startswith("prm_beta prm_learning_rate prm_update=after advantage_estimator=rloo")
    assert text.index("The core of PRIME: ") < text.index("The models of the implicit PRM: prm_model_init_kwargs")
    for shown in ("accuracy_low=0.2", " learning_rate", "dataset_name ", "lora_r=16", "--help all", "max_steps"):
        assert shown in text
    assert "adam_beta1" not in text


def test_all_help_explains_every_field_once():
    types = _types()
    text = help_text(types, "trl-prime train", "all")
    names = {name for cls in types for name, given in cls.__dataclass_fields__.items() if given.init}
    flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert sorted(flags) == sorted(f"--{name}" for name in names)


def test_help_on_a_word_is_that_of_names_and_groups():
    by_name = help_text([Arguments], "trl-prime test", "--width")
    assert "How wide. 100% is all. (default: 3)" in by_name and "--names" not in by_name
    by_group = help_text([Arguments], "trl-prime test", "size")
    assert "--width int" in by_group and "--names text ..." in by_group and "--rate" not in by_group
    assert "--color red|blue" in help_text([Arguments], "trl-prime test")
    with pytest.raises(ValueError, match="No field of trl-prime test has 'hight'"):
        help_text([Arguments], "trl-prime test", "hight")


def test_the_list_of_commands_loads_nothing_heavy():
    code = "import sys; from trl_prime.cli import main; main(['--help']); print('torch' in sys.modules)"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()
    assert lines[-1] == "False"
    assert {line.split()[0] for line in lines if line.startswith("  ")} >= {*COMMANDS}
