"""ACmix: self-attention and convolution over one set of projections (Pan et al., CVPR 2022)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acmix.layers.block import ACmix

__all__ = ["ACmix"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on first use: the config and its error messages should not have to wait for torch.
    if name == "ACmix":
        from acmix.layers.block import ACmix

        return ACmix
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
