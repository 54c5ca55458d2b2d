"""Tests of `trl_prime.sandbox`. This is a package, since `tests/` has a `test_programs.py` of its own."""
