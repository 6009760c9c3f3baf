"""A picture of one prediction: the image, its likely classes, and what the paths of each stage make of it."""

from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor, nn

from acmix.analysis.attention_maps import attention_map
from acmix.export.load import Trained
from acmix.export.predict import Prediction
from acmix.export.preprocessing import Preprocessing
from acmix.layers import ACmix, AttentionPath
from acmix.telemetry.figure_file import drawn_text
from acmix.telemetry.plot import BLUE, GREY, INK, STYLE

Map = NDArray[np.floating]

COLOURS = "viridis"  # perceptually uniform, and readable with any colour vision
_IMAGE, _PANEL, _GAP, _MARGIN = 2.3, 1.6, 0.12, 0.2  # inches: the image, a map, between maps, around all
_LABELS, _HEAD, _LINE, _SCALE = 1.2, 0.62, 0.34, 0.4  # the names of rows, headlines, a class, the scale of colours


@dataclass(frozen=True)
class StageView:
    """What the last block of a stage makes of an image.

    alpha, beta: the path weights, or their means; size: (h, w) of the block's output; looks: how much its middle pixel
    takes of each pixel of v, which may be a map of another size; attention, convolution: RMS over the channels of
    alpha · attention and beta · convolution, (h, w). None for a path that the block lacks.
    """

    stage: int
    alpha: float
    beta: float
    size: tuple[int, int]
    looks: Map | None
    attention: Map | None
    convolution: Map | None


def draw_prediction(prediction: Prediction, preprocessing: Preprocessing, trained: Trained) -> Figure:
    """The image as the network saw it, bars of its likely classes, and a column of maps for each stage with blocks."""
    views = stage_views(trained.model, prediction.image.to(trained.dist.device))
    rows = [row for row in _ROWS if any(getattr(view, row[0]) is not None for view in views)]
    seen = _picture(prediction.image, preprocessing)
    with matplotlib.rc_context(STYLE):
        page = _Page(len(views), len(rows), len(prediction.top))
        _draw_image(page, prediction, seen)
        for column, view in enumerate(views):
            _draw_stage(page, column, view, rows, seen)
    return page.figure


class _Page:
    """A figure whose parts are placed in inches from its upper left corner."""

    def __init__(self, columns: int, rows: int, classes: int) -> None:
        left = _MARGIN + _HEAD + _IMAGE + _LINE * classes
        right = _HEAD + rows * (_PANEL + _GAP) + _SCALE
        self.width = 2 * _MARGIN + _IMAGE + (_LABELS + columns * (_PANEL + _GAP) if columns else 0.0)
        self.height = max(left, right if columns else 0.0) + _MARGIN
        self.figure = Figure(figsize=(self.width, self.height))

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes without ticks and frame."""
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        axis: Axes = self.figure.add_axes(place)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        return axis


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


def _view(stage: int, parent: nn.Module, block: ACmix, seen: dict[nn.Module, tuple[Tensor | None, ...]]) -> StageView:
    alpha, beta = (torch.as_tensor(weight).detach() for weight in block.mix.weights())
    attention, convolution = seen[block.mix]
    given = convolution if attention is None else attention
    assert given is not None
    size = given.shape[2], given.shape[3]
    shift = getattr(parent, "shift_size", (0, 0))  # by which Swin rolls the block's map up and left
    looks = None
    if isinstance(block.attention, AttentionPath):
        q, k, v = (maps for maps in seen[block.attention] if maps is not None)
        looks = _looks(block.attention, (q, k, v), size, shift)
        looks = looks[: size[0] * block.stride, : size[1] * block.stride]  # without what was padded
    return StageView(
        stage,
        float(alpha.mean()),
        float(beta.mean()),
        size,
        _rolled_back(looks, shift),
        None if attention is None else _rolled_back(_rms(alpha * attention), shift),
        None if convolution is None else _rolled_back(_rms(beta * convolution), shift),
    )


def _looks(
    path: AttentionPath, maps: tuple[Tensor, Tensor, Tensor], size: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """Where the pixel in the middle of an output of this size looks, still rolled and padded."""
    height, width = size
    row, column = ((side // 2 - by) % side for side, by in zip(size, shift, strict=True))
    q = maps[0]
    tokens = q.shape[3] - height * width if path.takes_tokens and q.shape[2] == 1 else 0
    if not tokens:
        return attention_map(path, *maps, (row, column))
    weights = attention_map(path, *maps, (0, tokens + row * width + column))  # tokens, then the pixels, in one row
    return weights[0, tokens:].unflatten(0, size)


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


def _draw_image(page: _Page, prediction: Prediction, seen: Map) -> None:
    """The image and, below it, a bar for each class."""
    axis = page.axes(_MARGIN, _HEAD, _IMAGE, _IMAGE)
    axis.imshow(seen, interpolation="nearest")
    axis.set_title(_short(prediction.path.name, 34), loc="left", fontsize=9, color=INK, pad=6)
    count = len(prediction.top)
    bars = page.axes(_MARGIN, _HEAD + _IMAGE + _MARGIN, _IMAGE, _LINE * count)
    for place, (name, probability) in enumerate(prediction.top):
        bars.barh([place + 0.33] * 2, [1, probability], height=0.12, color=["#E8E8E8", BLUE])
        bars.text(0, place, _short(name, 26), va="center", fontsize=8.5, color=INK)
        bars.text(1, place, f"{100 * probability:.1f} %", va="center", ha="right", fontsize=8.5, color=INK)
    bars.set_xlim(0, 1)
    bars.set_ylim(count - 0.5, -0.5)


def _short(text: str, limit: int) -> str:
    return drawn_text(text if len(text) <= limit else f"{text[: limit - 1]}…")


def _draw_stage(page: _Page, column: int, view: StageView, rows: list[tuple[str, str]], seen: Map) -> None:
    """A column of maps; those of what the paths give share their colours."""
    x = 2 * _MARGIN + _IMAGE + _LABELS - _GAP + column * (_PANEL + _GAP)
    highest = max((float(m.max()) for m in (view.attention, view.convolution) if m is not None), default=1.0)
    shown = None
    for row, (name, label) in enumerate(rows):
        axis = page.axes(x, _HEAD + row * (_PANEL + _GAP), _PANEL, _PANEL)
        values = getattr(view, name)
        if name == "looks":
            _draw_looks(axis, values, view.size, seen)
        elif values is not None:
            shown = axis.imshow(values, cmap=COLOURS, vmin=0, vmax=highest or 1.0, interpolation="nearest")
        else:
            axis.text(0.5, 0.5, "no such path", ha="center", va="center", fontsize=8.5, color=GREY)
        if column == 0:
            axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8.5, color=INK, labelpad=6)
        if row == 0:
            axis.set_title(_headline(view), loc="center", fontsize=9, color=INK, pad=6, linespacing=1.5)
    if shown is not None:
        axis = page.axes(x, _HEAD + len(rows) * (_PANEL + _GAP), _PANEL, 0.07)
        _draw_scale(page.figure, axis, shown, highest)


def _headline(view: StageView) -> str:
    height, width = view.size
    return f"stage {view.stage} · {height}×{width}\nα {view.alpha:.2f}   β {view.beta:.2f}"


def _draw_looks(axis: Axes, weights: Map | None, size: tuple[int, int], seen: Map) -> None:
    """The weights over the image in pale grey, and a cross at the query."""
    grey = 0.55 + 0.45 * seen.mean(2)
    if weights is None:
        axis.imshow(grey, cmap="gray", vmin=0, vmax=1)
        return
    height, width = weights.shape
    row, column = (_middle(side, count) for side, count in zip(size, weights.shape, strict=True))
    box = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=box)
    share = np.clip(weights / max(float(weights.max()), 1e-12), 0, 1)
    colours = matplotlib.colormaps[COLOURS](share)
    colours[..., 3] = 0.9 * share**0.35
    axis.imshow(colours, extent=box, interpolation="nearest")
    rows, columns = np.nonzero(share.any(1))[0], np.nonzero(share.any(0))[0]
    reach = (columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    axis.add_patch(Rectangle((columns[0] - 0.5, rows[0] - 0.5), *reach, fill=False, edgecolor=INK, linewidth=0.8))
    axis.plot(column, row, "+", color="white", markersize=9, markeredgewidth=3.2)
    axis.plot(column, row, "+", color="#D55E00", markersize=8, markeredgewidth=1.6)


def _middle(side: int, count: int) -> float:
    """Where the middle one of `side` pixels lies among `count` that show the same: a multiple of them or a part."""
    if count >= side:
        return side // 2 * (count // side)
    return (side // 2 + 0.5) * count / side - 0.5


def _draw_scale(figure: Figure, axis: Axes, shown: AxesImage, highest: float) -> None:
    bar = figure.colorbar(shown, cax=axis, orientation="horizontal", ticks=[0, highest])
    bar.outline.set_visible(False)  # type: ignore[operator]
    axis.set_xticklabels(["0", f"{highest:.2g}"], fontsize=8, color=GREY)
    axis.tick_params(length=0, pad=2)
    low, high = axis.get_xticklabels()
    low.set_horizontalalignment("left")
    high.set_horizontalalignment("right")
