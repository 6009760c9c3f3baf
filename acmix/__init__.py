"""ACmix: self-attention and convolution over one set of projections (Pan et al., CVPR 2022)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acmix.layers.block import ACmix
    from acmix.layers.inference import fuse

__all__ = ["ACmix", "fuse"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on first use: the config and its error messages should not have to wait for torch.
    if name == "ACmix":
        from acmix.layers.block import ACmix

        return ACmix
    if name == "fuse":
        from acmix.layers.inference import fuse

        return fuse
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
