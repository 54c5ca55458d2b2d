"""PRIME (Process Reinforcement through Implicit Rewards, arXiv 2502.01456) for TRL."""

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .data.adapters import load_prime_dataset
    from .implicit_prm import ImplicitPRM
    from .offline_prm import OfflinePRMConfig, OfflinePRMTrainer
    from .prime_config import PRIMEConfig
    from .prime_trainer import PRIMETrainer

__all__ = [
    "ImplicitPRM",
    "OfflinePRMConfig",
    "OfflinePRMTrainer",
    "PRIMEConfig",
    "PRIMETrainer",
    "__version__",
    "load_prime_dataset",
]

_MODULES = {
    "ImplicitPRM": ".implicit_prm",
    "OfflinePRMConfig": ".offline_prm",
    "OfflinePRMTrainer": ".offline_prm",
    "PRIMEConfig": ".prime_config",
    "PRIMETrainer": ".prime_trainer",
    "load_prime_dataset": ".data.adapters",
}


def __getattr__(name: str) -> Any:
    # Lazy, as in TRL: the pure parts can be imported without loading a trainer
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
