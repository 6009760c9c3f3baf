"""PathMix: how much of each path a block takes."""

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Self

import torch
from torch import Tensor, nn

MODES = ("attention", "convolution", "sum", "convex", "learned", "fixed")
GRANULARITIES = ("block", "head", "channel")
START = 0.5


class PathMix(nn.Module):
    """The path weights of one ACmix block: alpha · attention + beta · convolution (paper section 3.2, table 5).

    Args:
        mode: The effective (alpha, beta): `attention` (1, 0), `convolution` (0, 1), `sum` (1, 1), `convex`
            (alpha, 1 - alpha) with alpha learned, `learned` (alpha, beta), both learned, `fixed` (alpha, beta), both
            as given.
        stage: 1-based stage of the network that the block stands in, for logs; models set it.
        alpha, beta: Where learned weights start, or the fixed ones; None for 0.5. `convex` takes alpha alone.
        per: What has a learned weight of its own: the `block` (a scalar, the paper's choice), each `head` or each
            `channel` of the block's output. The channels of head n are n · d to (n + 1) · d - 1, as local attention
            gives them; those of the convolution path and of an attention with a projection mix all heads.
        tied: Whether the blocks of a stage share their learned weights; the network then calls `tie_path_weights`.
        heads, channels: N, and N · d, of the block.

    The learned weights are not to be weight-decayed unless asked for: decay pulls both paths to zero. A weight that the
    mode fixes is no parameter.

    Raises:
        ValueError: for an unknown mode or `per`, and for an argument that the mode makes no use of.
    """

    def __init__(
        self,
        mode: str = "learned",
        stage: int = 1,
        *,
        alpha: float | None = None,
        beta: float | None = None,
        per: str = "block",
        tied: bool = False,
        heads: int = 1,
        channels: int = 1,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"unknown mix {mode!r}: choose one of {', '.join(MODES)}")
        if per not in GRANULARITIES:
            raise ValueError(f"unknown mix.per {per!r}: choose one of {', '.join(GRANULARITIES)}")
        _refuse_useless(mode, alpha=alpha, beta=beta, per=per if per != "block" else None, tied=tied or None)
        self.mode, self.stage, self.per, self.tied = mode, stage, per, tied
        self.heads, self.channels = heads, channels
        self.start = START if alpha is None else float(alpha), START if beta is None else float(beta)
        # The mix whose weights count here, none for its own; None where that is still to be said. In a tuple it is no
        # submodule, so that no parameter is named twice.
        self._leader: tuple[PathMix, ...] | None = None if tied else ()
        shape = {"block": (), "head": (heads,), "channel": (channels,)}[per]
        if mode in ("convex", "learned"):
            self.alpha = nn.Parameter(torch.full(shape, self.start[0]))
        if mode == "learned":
            self.beta = nn.Parameter(torch.full(shape, self.start[1]))

    @classmethod
    def build(cls, mix: str | Mapping[str, Any], stage: int, heads: int, channels: int) -> Self:
        """The mix of a block: from its mode, or from a mapping of mode, alpha, beta, per and tied.

        Raises:
            ValueError: as the constructor, and for a key that there is not.
        """
        options: dict[str, Any] = {"mode": mix} if isinstance(mix, str) else dict(mix)
        known = ("mode", "alpha", "beta", "per", "tied")
        if unknown := [key for key in options if key not in known]:
            nearest = get_close_matches(unknown[0], known, n=1, cutoff=0.0)[0]
            raise ValueError(f"mix.{unknown[0]}: unknown key; nearest: {nearest} (all: {', '.join(known)})")
        for key in ("alpha", "beta"):
            weight = options.get(key)
            if weight is not None and (type(weight) not in (int, float) or not math.isfinite(weight)):
                raise ValueError(f"mix.{key}: must be a finite number, got {weight!r}")
        if not isinstance(options.get("tied", False), bool):
            raise ValueError(f"mix.tied: must be true or false, got {options['tied']!r}")
        return cls(stage=stage, heads=heads, channels=channels, **options)

    @property
    def has_attention(self) -> bool:
        """Whether the attention path takes part."""
        return self.mode != "convolution"

    @property
    def has_convolution(self) -> bool:
        """Whether the convolution path takes part."""
        return self.mode != "attention"

    @property
    def is_scalar(self) -> bool:
        """Whether each path has one weight for the whole block."""
        return self.per == "block"

    def weights(self) -> tuple[Tensor | float, Tensor | float]:
        """The effective (alpha, beta), each a factor of its path's map (B, C, H, W).

        A number where the mode fixes it; where learned a scalar tensor, or (C, 1, 1) with a weight for each head or
        channel.
        """
        if self._leader is None:
            raise RuntimeError("mix.tied: the network must call acmix.layers.tie_path_weights on itself when built")
        if self._leader:
            return self._leader[0].weights()
        if self.mode == "learned":
            return self._factor(self.alpha), self._factor(self.beta)
        if self.mode == "convex":
            return self._factor(self.alpha), self._factor(1 - self.alpha)
        return self.start if self.mode == "fixed" else (float(self.has_attention), float(self.has_convolution))

    def reset_parameters(self) -> None:
        """Put the learned weights back to where they start."""
        for weight, start in zip(self.parameters(), self.start, strict=False):
            nn.init.constant_(weight, start)

    def forward(self, attention: Tensor | None, convolution: Tensor | None) -> Tensor:
        """Mix two maps of one shape; None stands for a path that is not there.

        A block calls this where somebody looks and where the weights are not scalars (see `ACmix.forward`). Otherwise
        it folds each weight into the last small matrix of its path, which gives the same map without another pass over
        memory.
        """
        alpha, beta = self.weights()
        weighed = [
            _weigh(path, weight) for weight, path in ((alpha, attention), (beta, convolution)) if path is not None
        ]
        return weighed[0] if len(weighed) == 1 else weighed[0] + weighed[1]

    def extra_repr(self) -> str:
        policy = "" if self.is_scalar else f", per={self.per}"
        return f"mode={self.mode}, stage={self.stage}{policy}{', tied' if self.tied else ''}"

    def _factor(self, weight: Tensor) -> Tensor:
        if self.per == "head":
            weight = weight.repeat_interleave(self.channels // self.heads)
        return weight if self.is_scalar else weight[:, None, None]


def path_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learned path weights of every block, alpha and beta, by their names in `model.named_parameters()`."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, mix in model.named_modules()
        if isinstance(mix, PathMix)
        for name, parameter in mix.named_parameters()
    }


def tie_path_weights(model: nn.Module) -> None:
    """Let the blocks of each stage share the learned weights of the stage's first block, where their mix is tied.

    The others have no weights of their own from then on. A network calls it when its blocks are built.

    Raises:
        ValueError: for blocks of one stage that differ in their heads or channels, and have a weight for each.
    """
    leaders: dict[int, PathMix] = {}
    for mix in model.modules():
        if not (isinstance(mix, PathMix) and mix.tied):
            continue
        leader = leaders.setdefault(mix.stage, mix)
        if not mix.is_scalar and (mix.heads, mix.channels) != (leader.heads, leader.channels):
            raise ValueError(f"mix.tied: the blocks of stage {mix.stage} differ in width; choose mix.per: block")
        mix._leader = () if mix is leader else (leader,)
        for name in [] if mix is leader else list(mix._parameters):
            delattr(mix, name)


def _refuse_useless(mode: str, **given: Any) -> None:
    takes = {
        "learned": ("alpha", "beta", "per", "tied"),
        "convex": ("alpha", "per", "tied"),
        "fixed": ("alpha", "beta"),
    }
    for key, value in given.items():
        if value is not None and key not in takes.get(mode, ()):
            raise ValueError(f"mix.{key}: has no effect with the mode {mode}; leave it out")


def _weigh(path: Tensor, weight: Tensor | float) -> Tensor:
    if isinstance(weight, Tensor) and weight.dim():
        weight = weight.to(path.dtype)  # autocast would widen the whole map for its sake; scalars do not
    return weight * path
