"""One module for each command of `trl-prime`, each with a function `run(argv) -> int` that returns the exit code."""
