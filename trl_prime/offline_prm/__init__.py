"""Training an implicit PRM on completions that exist already."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .offline_prm_config import OfflinePRMConfig
    from .offline_prm_trainer import OfflinePRMTrainer

__all__ = ["OfflinePRMConfig", "OfflinePRMTrainer"]

_MODULES = {"OfflinePRMConfig": ".offline_prm_config", "OfflinePRMTrainer": ".offline_prm_trainer"}


def __getattr__(name: str) -> Any:
    # Lazy, so that the settings can be read and data be prepared without loading a trainer
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
