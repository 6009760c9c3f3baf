"""What became of each tensor when a network was grown."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layer:
    """One ACmix block of the grown network.

    name: Its name. exact: whether it gives what the layer it came from gave. text: how it came about. energy: of an
    approximated block, the share (0 to 1) of the energy of the layer's outputs that its kernels keep.
    fit: with a calibration, the share of the variance of the layer's outputs that the block gives there.
    """

    name: str
    exact: bool
    text: str
    energy: float | None = None
    fit: float | None = None

    def __str__(self) -> str:
        kept = "" if self.energy is None else f"; energy kept {100 * self.energy:.1f} %"
        fit = "" if self.fit is None else f", outputs fitted to {100 * self.fit:.1f} %"
        return f"{self.name}  {'exact' if self.exact else 'approximated'}: {self.text}{kept}{fit}"


@dataclass
class Growth:
    """What `grow` did.

    layers: The ACmix blocks in order. new: names of the parameters that the source does not hold, which training has
    to find. dropped: names in the source of tensors that were left out, each with the reason. notes: whatever else is
    not as it was in the source. copied: number of tensors outside the blocks that were taken as they are.
    """

    layers: list[Layer] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    copied: int = 0

    @property
    def exact(self) -> bool:
        """Whether the network gives the source's logits, up to rounding."""
        return not self.notes and all(layer.exact for layer in self.layers)

    def lines(self) -> list[str]:
        """The report for a person, a line for each block and for each thing that differs."""
        told = [str(layer) for layer in self.layers]
        told += [f"dropped: {name} ({reason})" for name, reason in self.dropped.items()]
        told += [f"note: {note}" for note in self.notes]
        return [*told, f"outside the blocks: {self.copied} tensors taken as they are"]
