"""The second model: a causal LM trained on outcome labels, whose log-ratios to a reference are process rewards."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import ImplicitPRM, ScoredCompletion

__all__ = ["ImplicitPRM", "ScoredCompletion"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `implicit_prm.losses` needs neither transformers nor peft
    if name in __all__:
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
