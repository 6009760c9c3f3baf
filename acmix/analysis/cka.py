"""Linear CKA: how alike two layers represent the same images, within one network or between two."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from acmix.analysis.blocks import acmix_blocks, measuring


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of features x (n, p) and y (n, q) of the same n images, from 0 to 1.

    HSIC(x xᵀ, y yᵀ) / sqrt(HSIC(x xᵀ, x xᵀ) · HSIC(y yᵀ, y yᵀ)) after Kornblith et al., "Similarity of neural network
    representations revisited", https://arxiv.org/abs/1905.00414. 1: equal up to rotation and scale; it does not
    change with either. NaN for features that are the same for all images. With far fewer images than features
    it leans towards 1: compare values of one n only.
    """
    return float(cka_matrix([x], [y])[0, 0])


def cka_matrix(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """`linear_cka` of each of `rows` with each of `columns`, features (n, ...) that are flattened: float64."""
    a, b = (torch.stack([_centred_gram(features).flatten() for features in layers]) for layers in (rows, columns))
    scale = a.norm(dim=1)[:, None] * b.norm(dim=1)
    return (a @ b.T) / scale


def _centred_gram(features: Tensor) -> Tensor:
    """H x xᵀ H of the flattened features x, in float64, with H the centring matrix: (n, n)."""
    x = features.flatten(1).double()
    x = x - x.mean(0)
    return x @ x.T


def layer_names(model: nn.Module) -> list[str]:
    """The modules around the ACmix blocks, with their shortcuts, in depth order: the usual layers to compare.

    Of a model without such blocks the stages, as timm's `feature_info` names them.
    """
    around = [block.layer.rpartition(".")[0] or block.layer for block in acmix_blocks(model)]
    return around or [info["module"] for info in getattr(model, "feature_info", [])]


@torch.no_grad()
def layer_outputs(model: nn.Module, images: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """What each of the named modules gives for images (B, C, H, W), in evaluation mode."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, out: Tensor) -> None:
        outputs[name] = out.clone()  # the next layer may write into it

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: keep(name, out))
        for name in layers
    ]
    try:
        with measuring(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [outputs[name] for name in layers]
