"""The block under the names of the authors' code (github.com/LeapLabTHU/ACmix)."""

from acmix.layers import ACmix as Block


class ACmix(Block):
    """`acmix.ACmix` by the authors' signature; `acmix.models.load_official` loads their weights into it.

    Args:
        in_planes: Channels of the input map.
        out_planes: Channels of the output map.
        kernel_att: Window of the attention, odd.
        head: Number of heads.
        kernel_conv: Kernel of the convolution path, odd.
        stride, dilation: Of both paths.

    Raises:
        ValueError: as `acmix.ACmix`.
    """

    def __init__(
        self,
        in_planes: int,
        out_planes: int,
        kernel_att: int = 7,
        head: int = 4,
        kernel_conv: int = 3,
        stride: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__(in_planes, out_planes, head, kernel_att, kernel_conv, stride, dilation)
