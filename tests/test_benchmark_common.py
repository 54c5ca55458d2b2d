"""The parts that the benchmarks share: the machine, the file of results, tables."""

import json

import pytest


@pytest.fixture(scope="module")
def common(benchmarks):
    import common

    return common


def test_the_machine_and_the_versions_of_what_is_installed(common, tmp_path):
    import torch

    found = common.machine("torch", "no-such-package")
    assert list(found["versions"]) == ["torch"]
    assert torch.__version__.startswith(
        found["versions"]["torch"]
    )  # `+cu124` is not always part of the package's version
    assert found["cores"] >= 1 and found["platform"] and found["python"]
    common.write({"machine": found}, tmp_path / "results" / "x.json")
    assert json.loads((tmp_path / "results" / "x.json").read_text()) == {"machine": found}


def test_tables_of_markdown(common):
    lines = common.markdown_table(["", "a", "b"], [["x", "1", ""], ["y", "", "2"]]).splitlines()
    assert lines == ["| | a | b |", "|---|---|---|", "| x | 1 |  |", "| y |  | 2 |"]
