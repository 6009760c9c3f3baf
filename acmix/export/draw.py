"""A picture of one prediction: the image, its likely classes, and what the paths of each stage make of it."""

from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from torch import Tensor, nn

from acmix.analysis.attention_maps import attention_map
from acmix.export.load import Trained
from acmix.export.predict import Prediction
from acmix.export.preprocessing import Preprocessing
from acmix.layers import ACmix, AttentionPath
from acmix.telemetry.plot import BLUE, GREY, INK, STYLE

Map = NDArray[np.floating]

COLOURS = "viridis"  # perceptually uniform, and readable with any colour vision
_PANEL, _LEFT, _HEAD = 1.75, 2.9, 1.05  # inches: a map, the column of the image, the headlines


@dataclass(frozen=True)
class StageView:
    """What the last block of a stage makes of an image.

    looks: weights (H, W) of the query at `centre` (row, column) of it; attention, convolution: RMS over the channels of
    alpha · attention and beta · convolution, (h, w). None for a path that the block lacks.
    """

    stage: int
    alpha: float
    beta: float
    centre: tuple[int, int]
    looks: Map | None
    attention: Map | None
    convolution: Map | None


def draw_prediction(prediction: Prediction, preprocessing: Preprocessing, trained: Trained) -> Figure:
    """The image as the network saw it, bars of its likely classes, and a column of maps for each stage with blocks."""
    views = stage_views(trained.model, prediction.image.to(trained.dist.device))
    rows = [row for row in _ROWS if any(getattr(view, row[0]) is not None for view in views)]
    height = max(2.9, _HEAD + _PANEL * 1.12 * len(rows) + 0.45)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_LEFT + (_PANEL * 1.12 * len(views) + 0.75 if views else 0), height))
        left_share = _LEFT / figure.get_figwidth()
        seen = _picture(prediction.image, preprocessing)
        _draw_classes(figure, prediction, seen, left_share)
        if views:
            _draw_stages(figure, views, rows, seen, left_share)
    return figure


def stage_views(model: nn.Module, image: Tensor) -> list[StageView]:
    """The view of each stage, from one pass of one image (C, H, W), in float32."""
    blocks: dict[int, tuple[nn.Module, ACmix]] = {}
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, ACmix):
                blocks[child.mix.stage] = (parent, child)
    seen: dict[nn.Module, tuple[Tensor | None, ...]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(module, inputs))
        for _, block in blocks.values()
        for module in (block.mix, block.attention)
        if module is not None
    ]
    try:
        with torch.no_grad():
            model(image[None])
    finally:
        for hook in hooks:
            hook.remove()
    return [_view(stage, parent, block, seen) for stage, (parent, block) in sorted(blocks.items())]


def _view(
    stage: int, parent: nn.Module, block: ACmix, seen: dict[nn.Module, tuple[Tensor | None, ...]]
) -> StageView:
    alpha, beta = (float(weight) for weight in block.mix.weights())
    attention, convolution = seen[block.mix]
    given = convolution if attention is None else attention
    assert given is not None
    height, width = given.shape[2:]
    shift = getattr(parent, "shift_size", (0, 0))  # by which Swin rolls the block's map up and left
    query = (height // 2, width // 2)
    looks = None
    if isinstance(block.attention, AttentionPath):
        q, k = seen[block.attention][:2]
        assert q is not None
        assert k is not None
        rolled = ((query[0] - shift[0]) % height, (query[1] - shift[1]) % width)
        weights = attention_map(block.attention, q, k, rolled)
        looks = weights if weights.shape[0] < height else weights[: height * block.stride, : width * block.stride]
    return StageView(
        stage,
        alpha,
        beta,
        (query[0] * block.stride, query[1] * block.stride),
        _rolled_back(looks, shift),
        None if attention is None else _rolled_back(_rms(alpha * attention), shift),
        None if convolution is None else _rolled_back(_rms(beta * convolution), shift),
    )


def _rms(maps: Tensor) -> Tensor:
    """Root mean square over the channels: (1, C, H, W) to (H, W)."""
    return maps[0].float().square().mean(0).sqrt()


def _rolled_back(values: Tensor | None, shift: tuple[int, int]) -> Map | None:
    return None if values is None else torch.roll(values, shift, (0, 1)).float().cpu().numpy()


def _picture(image: Tensor, preprocessing: Preprocessing) -> Map:
    """(H, W, 3) in 0..1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    shown = (image * std + mean).clamp(0, 1).expand(3, -1, -1)
    picture: Map = shown.permute(1, 2, 0).numpy()
    return picture


_ROWS = (
    ("looks", "where attention\nlooks from +"),
    ("attention", "what attention\ngives (RMS)"),
    ("convolution", "what convolution\ngives (RMS)"),
)


def _draw_classes(figure: Figure, prediction: Prediction, seen: Map, share: float) -> None:
    """The image and, below it, a bar for each class."""
    high = figure.get_figheight()
    side = min(_LEFT - 0.5, high - 0.75 - 0.27 * len(prediction.top))
    axis = figure.add_axes((0.2 / figure.get_figwidth(), 1 - (side + 0.4) / high, side / figure.get_figwidth(), side / high))
    axis.imshow(seen, interpolation="nearest")
    axis.set_axis_off()
    axis.set_title(_short(prediction.path.name, 34), fontsize=9, color=INK, pad=6)
    bars = figure.add_axes(
        (0.2 / figure.get_figwidth(), 0.15 / high, side / figure.get_figwidth(), 0.27 * len(prediction.top) / high)
    )
    for place, (name, probability) in enumerate(prediction.top):
        bars.barh(place, probability, height=0.72, color=BLUE if place == 0 else "#B8D4E8")
        bars.text(0.015, place, _short(name, 24), va="center", fontsize=8, color="white" if _fits(name, probability) else INK)
        bars.text(1.0, place, f"{100 * probability:.1f} %", va="center", ha="right", fontsize=8, color=INK)
    bars.set_xlim(0, 1)
    bars.set_ylim(len(prediction.top) - 0.5, -0.5)
    bars.set_axis_off()


def _fits(name: str, probability: float) -> bool:
    return probability > 0.045 * min(24, len(name)) + 0.05


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _draw_stages(figure: Figure, views: list[StageView], rows: list[tuple[str, str]], seen: Map, share: float) -> None:
    high = figure.get_figheight()
    grid = figure.add_gridspec(
        len(rows) + 1, len(views),
        left=share + 0.85 / figure.get_figwidth(), right=1 - 0.15 / figure.get_figwidth(),
        top=1 - 0.62 / high, bottom=0.42 / high,
        height_ratios=[*[1.0] * len(rows), 0.045], wspace=0.08, hspace=0.08,
    )  # fmt: skip
    for column, view in enumerate(views):
        highest = max((float(m.max()) for m in (view.attention, view.convolution) if m is not None), default=1.0)
        shown = None
        for row, (name, label) in enumerate(rows):
            axis = figure.add_subplot(grid[row, column])
            values = getattr(view, name)
            if name == "looks":
                _draw_looks(axis, values, view.centre, seen)
            elif values is not None:
                shown = axis.imshow(values, cmap=COLOURS, vmin=0, vmax=highest or 1.0, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if column == 0:
                axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8.5, color=INK, labelpad=6)
            if row == 0:
                _head(axis, view)
        if shown is not None:
            _scale(figure, grid[len(rows), column], shown, highest)


def _head(axis: Axes, view: StageView) -> None:
    size = next(m for m in (view.attention, view.convolution) if m is not None).shape
    axis.set_title(
        f"stage {view.stage} · {size[0]}×{size[1]}\nα {view.alpha:.2f}   β {view.beta:.2f}",
        loc="center", fontsize=9, color=INK, pad=5, linespacing=1.5,
    )  # fmt: skip


def _draw_looks(axis: Axes, weights: Map | None, centre: tuple[int, int], seen: Map) -> None:
    """The weights over the image in pale grey, and a cross at the query."""
    grey = 0.55 + 0.45 * seen.mean(2)
    if weights is None:
        axis.imshow(grey, cmap="gray", vmin=0, vmax=1)
        return
    height, width = weights.shape
    box = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=box)
    share = np.clip(weights / max(float(weights.max()), 1e-12), 0, 1)
    colours = matplotlib.colormaps[COLOURS](share)
    colours[..., 3] = np.where(share > 0, 0.35 + 0.55 * share, 0.0)
    axis.imshow(colours, extent=box, interpolation="nearest")
    axis.plot(centre[1], centre[0], "+", color="white", markersize=9, markeredgewidth=3.2)
    axis.plot(centre[1], centre[0], "+", color="#D55E00", markersize=8, markeredgewidth=1.6)


def _scale(figure: Figure, place: object, shown: object, highest: float) -> None:
    """The colours of both paths' maps of a stage."""
    axis = figure.add_subplot(place)  # type: ignore[call-overload]
    bar = figure.colorbar(shown, cax=axis, orientation="horizontal", ticks=[0, highest])  # type: ignore[arg-type]
    bar.outline.set_visible(False)  # type: ignore[operator]
    axis.set_xticklabels(["0", f"{highest:.2g}"], fontsize=8, color=GREY)
    axis.tick_params(length=0, pad=2)
    axis.get_xticklabels()[0].set_ha("left")
    axis.get_xticklabels()[1].set_ha("right")
