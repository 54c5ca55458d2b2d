"""The version of this package, for caches and cards that depend on it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("trl-prime")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0.0.0"
