"""The package as a whole: what importing it does."""

import subprocess
import sys


def modules_after(*statements: str) -> list[set[str]]:
    """What is loaded after each of the statements, in one fresh interpreter."""
    code = "import sys\n" + "".join(f"{statement}\nprint(*sys.modules)\n" for statement in statements)
    lines = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [set(line.split(" ")) for line in lines[-len(statements) :]]


def test_importing_the_package_loads_no_framework():
    (loaded,) = modules_after("import trl_prime")
    assert "trl_prime" in loaded
    assert not loaded & {"torch", "transformers", "trl", "peft", "datasets", "matplotlib"}


def test_importing_the_trainer_loads_little_more_than_trl_does():
    trls, ours = modules_after(
        "from trl import GRPOTrainer, GRPOConfig", "from trl_prime import PRIMETrainer, PRIMEConfig, ImplicitPRM"
    )
    extra = {name.split(".")[0] for name in ours - trls}
    assert "trl_prime" in extra
    assert not extra & {"matplotlib", "math_verify", "sympy", "vllm", "deepspeed", "bitsandbytes"}
    assert len(ours - trls) < 60, sorted(ours - trls)
