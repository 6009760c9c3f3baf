"""PathMix: how much of each path a block takes."""

import torch
from torch import Tensor, nn

MODES = ("attention", "convolution", "sum", "convex", "learned")


class PathMix(nn.Module):
    """The path weights of one ACmix block: alpha · attention + beta · convolution (paper section 3.2, table 5).

    Args:
        mode: The effective (alpha, beta): `attention` (1, 0), `convolution` (0, 1), `sum` (1, 1), `convex`
            (alpha, 1 - alpha) with alpha learned, `learned` (alpha, beta), both learned.
        stage: 1-based stage of the network that the block stands in, for logs; models set it.

    The learned weights are scalars that start at 0.5. They are not to be weight-decayed: decay pulls both paths to
    zero. A weight that the mode fixes is no parameter.

    Raises:
        ValueError: for an unknown mode.
    """

    def __init__(self, mode: str = "learned", stage: int = 1) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"unknown mix {mode!r}: choose one of {', '.join(MODES)}")
        self.mode = mode
        self.stage = stage
        if mode in ("convex", "learned"):
            self.alpha = nn.Parameter(torch.tensor(0.5))
        if mode == "learned":
            self.beta = nn.Parameter(torch.tensor(0.5))

    @property
    def has_attention(self) -> bool:
        """Whether the attention path takes part."""
        return self.mode != "convolution"

    @property
    def has_convolution(self) -> bool:
        """Whether the convolution path takes part."""
        return self.mode != "attention"

    def weights(self) -> tuple[Tensor | float, Tensor | float]:
        """The effective (alpha, beta): a scalar tensor where learned, a number where the mode fixes it."""
        if self.mode == "learned":
            return self.alpha, self.beta
        if self.mode == "convex":
            return self.alpha, 1 - self.alpha
        return float(self.has_attention), float(self.has_convolution)

    def reset_parameters(self) -> None:
        """Put the learned weights back to 0.5."""
        for weight in self.parameters():
            nn.init.constant_(weight, 0.5)

    def forward(self, attention: Tensor | None, convolution: Tensor | None) -> Tensor:
        """Mix two maps of one shape; None stands for a path that is not there.

        A block calls this where somebody looks (see `ACmix.forward`). Otherwise it folds each weight into the last
        small matrix of its path, which gives the same map without another pass over memory.
        """
        alpha, beta = self.weights()
        weighed = [weight * path for weight, path in ((alpha, attention), (beta, convolution)) if path is not None]
        return weighed[0] if len(weighed) == 1 else weighed[0] + weighed[1]

    def extra_repr(self) -> str:
        return f"mode={self.mode}, stage={self.stage}"


def path_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learned path weights of every block, alpha and beta, by their names in `model.named_parameters()`."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, mix in model.named_modules()
        if isinstance(mix, PathMix)
        for name, parameter in mix.named_parameters()
    }
