"""PRIME (Process Reinforcement through Implicit Rewards, arXiv 2502.01456) for TRL."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .implicit_prm import ImplicitPRM
    from .offline_prm_config import OfflinePRMConfig
    from .offline_prm_trainer import OfflinePRMTrainer
    from .prime_config import PRIMEConfig
    from .prime_trainer import PRIMETrainer

try:
    __version__ = version("trl-prime")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0.0.0"

__all__ = ["ImplicitPRM", "OfflinePRMConfig", "OfflinePRMTrainer", "PRIMEConfig", "PRIMETrainer"]

_MODULES = {
    "ImplicitPRM": ".implicit_prm",
    "OfflinePRMConfig": ".offline_prm_config",
    "OfflinePRMTrainer": ".offline_prm_trainer",
    "PRIMEConfig": ".prime_config",
    "PRIMETrainer": ".prime_trainer",
}


def __getattr__(name: str) -> Any:
    # Lazy, as in TRL: the pure parts can be imported without loading a trainer
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
