"""The package as a whole: what importing it does."""

import subprocess
import sys


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_loads_no_framework():
    loaded = modules_after("import trl_prime")
    assert "trl_prime" in loaded
    assert not loaded & {"torch", "transformers", "trl", "peft", "datasets", "matplotlib"}


def test_importing_the_trainer_loads_little_more_than_trl_does():
    ours = modules_after("from trl_prime import PRIMETrainer, PRIMEConfig, ImplicitPRM")
    trls = modules_after("from trl import GRPOTrainer, GRPOConfig")
    extra = {name.split(".")[0] for name in ours - trls}
    assert not extra & {"matplotlib", "math_verify", "sympy", "vllm", "deepspeed", "bitsandbytes"}
    assert len(ours - trls) < 60, sorted(ours - trls)
