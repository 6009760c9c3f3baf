"""Draw the ACmix block at a glance: docs/block.svg, which opens the README.

    python scripts/draw_block.py [OUT.svg]

Plain SVG on a white panel, so that it reads the same on a light and on a dark page.
Exit status: 0 done, 2 refused.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from acmix.checkpoint.atomic import write_atomically
from acmix.process.program import Arguments, run_program

DEFAULT = Path(__file__).resolve().parents[1] / "docs" / "block.svg"
BLUE, VERMILLION, INK, GREY = "#0072B2", "#D55E00", "#333333", "#6B6B6B"
PALE = {BLUE: "#E8F2F9", VERMILLION: "#FCEFE6", INK: "#F5F5F5"}
SANS = "Inter, 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
SERIF = "'STIX Two Text', 'Latin Modern Roman', 'Times New Roman', 'Liberation Serif', 'DejaVu Serif', serif"
WIDTH, HEIGHT = 800, 300
MIDDLE, UPPER, LOWER = 142, 92, 192  # centre lines: input to output, attention path, convolution path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_program(lambda: write(arguments))


def write(arguments: Sequence[str] | None) -> int:
    """Write the drawing. Raises UserError for bad usage or a file that cannot be written."""
    parser = Arguments(prog="draw_block.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=DEFAULT, metavar="OUT.svg", help="file to write")
    write_atomically(parser.parse_args(arguments).out, draw(), make_parents=True)
    return 0


def draw() -> str:
    """The drawing as SVG text."""
    parts = [
        *headings(),
        feature_map(60, MIDDLE, "input"),
        arrow(f"M98 {MIDDLE} H122"),
        box(124, MIDDLE, 98, 64, INK, "1 × 1", "projections"),
        arrow(f"M222 {MIDDLE} H246"),
        *projected(),
        *attention_path(),
        *convolution_path(),
        plus(668, MIDDLE),
        arrow(f"M681 {MIDDLE} H702"),
        feature_map(740, MIDDLE, "output"),
        formula(),
    ]
    return "\n".join([*opening(), *parts, "</svg>", ""])


def opening() -> list[str]:
    """The SVG element, what it shows in words, the arrowheads and the panel."""
    heads = "".join(
        f'<marker id="head-{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0.5 L8 4 L0 7.5 z" fill="{colour}"/></marker>'
        for name, colour in (("ink", INK), ("blue", BLUE), ("vermillion", VERMILLION))
    )
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-labelledby="title description" font-family="{SANS}">',
        '<title id="title">The ACmix block</title>',
        '<desc id="description">One set of 1 × 1 projections gives q, k and v; attention and convolution use them; '
        "alpha times the one and beta times the other are added.</desc>",
        f"<defs>{heads}</defs>",
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10" fill="#FFFFFF" stroke="#E3E3E3"/>',
    ]


def headings() -> list[str]:
    """The idea of the block, above its two halves."""
    return [
        text(218, 32, "computed once", 14, GREY),
        text(496, 32, "used twice", 14, GREY),
        '<path d="M124 42 H312 M356 42 H636" stroke="#C9C9C9"/>',
    ]


def projected() -> list[str]:
    """q, k and v in one frame, from which both paths start."""
    frame = '<rect x="248" y="65" width="64" height="154" rx="8" fill="#FFFFFF" stroke="#A8A8A8"/>'
    tiles = []
    for index, name in enumerate("qkv"):
        y = MIDDLE + (index - 1) * 48
        tiles += [
            f'<rect x="257" y="{y - 20}" width="46" height="40" rx="4" fill="{PALE[INK]}" stroke="{INK}" '
            'stroke-width="1.5"/>',
            symbol(280, y + 6, name, INK),
        ]
    return [frame, *tiles]


def attention_path() -> list[str]:
    """q, k, v → attention → alpha."""
    return [
        arrow(f"M312 {MIDDLE} C334 {MIDDLE} 322 {UPPER} 344 {UPPER} H354", BLUE),
        box(356, UPPER, 214, 58, BLUE, "attention", "softmax over a window"),
        arrow(f"M570 {UPPER} H600", BLUE),
        weight(619, UPPER, "α", BLUE),
        arrow(f"M636 {UPPER} H660 Q668 {UPPER} 668 {UPPER + 8} V{MIDDLE - 15}", BLUE),
    ]


def convolution_path() -> list[str]:
    """q, k, v → fully connected layer → shift and sum → beta."""
    return [
        arrow(f"M312 {MIDDLE} C334 {MIDDLE} 322 {LOWER} 344 {LOWER} H354", VERMILLION),
        box(356, LOWER, 78, 58, VERMILLION, "FC", "to 9 maps"),
        arrow(f"M434 {LOWER} H454", VERMILLION),
        box(456, LOWER, 114, 58, VERMILLION, "shift & sum", "3 × 3 kernel"),
        arrow(f"M570 {LOWER} H600", VERMILLION),
        weight(619, LOWER, "β", VERMILLION),
        arrow(f"M636 {LOWER} H660 Q668 {LOWER} 668 {LOWER - 8} V{MIDDLE + 15}", VERMILLION),
    ]


def formula() -> str:
    """The block in one line, in the colours of the paths."""
    return (
        f'<text x="{WIDTH / 2}" y="272" font-size="17" text-anchor="middle" fill="{INK}">output = '
        f'<tspan fill="{BLUE}">{letter("α")} · attention({letter("q, k, v")})</tspan> + '
        f'<tspan fill="{VERMILLION}">{letter("β")} · convolution({letter("q, k, v")})</tspan></text>'
    )


def box(left: float, y: float, width: float, height: float, colour: str, name: str, detail: str) -> str:
    """A rounded box with a name and a line below it."""
    centre = left + width / 2
    return (
        f'<rect x="{left}" y="{y - height / 2}" width="{width}" height="{height}" rx="6" fill="{PALE[colour]}" '
        f'stroke="{colour}" stroke-width="1.5"/>'
        + text(centre, y - 3, name, 15, colour, weight=600)
        + text(centre, y + 16, detail, 13, INK)
    )


def feature_map(x: float, y: float, name: str) -> str:
    """Three sheets, one behind the other, with a name below."""
    sheets = "".join(
        f'<rect x="{x - 22 + shift}" y="{y - 22 - shift}" width="44" height="44" rx="3" fill="{PALE[INK]}" '
        f'stroke="{INK}" stroke-width="1.5"/>'
        for shift in (8, 0, -8)
    )
    return sheets + text(x, y + 52, name, 15, INK)


def weight(x: float, y: float, name: str, colour: str) -> str:
    """A path weight: a filled circle that the path runs through."""
    return f'<circle cx="{x}" cy="{y}" r="17" fill="{colour}"/>' + symbol(x, y + 6, name, "#FFFFFF")


def plus(x: float, y: float) -> str:
    """The sum of the paths."""
    return (
        f'<circle cx="{x}" cy="{y}" r="13" fill="#FFFFFF" stroke="{INK}" stroke-width="1.5"/>'
        f'<path d="M{x - 7} {y} H{x + 7} M{x} {y - 7} V{y + 7}" stroke="{INK}" stroke-width="1.5"/>'
    )


def arrow(path: str, colour: str = INK) -> str:
    """An arrow along an SVG path."""
    head = {INK: "ink", BLUE: "blue", VERMILLION: "vermillion"}[colour]
    return f'<path d="{path}" stroke="{colour}" stroke-width="1.5" fill="none" marker-end="url(#head-{head})"/>'


def text(x: float, y: float, words: str, size: int, colour: str, weight: int = 400) -> str:
    """Centred words."""
    words = words.replace("&", "&amp;")
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="middle" fill="{colour}">'
        f"{words}</text>"
    )


def symbol(x: float, y: float, name: str, colour: str) -> str:
    """A mathematical letter, centred."""
    return f'<text x="{x}" y="{y}" font-size="20" text-anchor="middle" fill="{colour}">{letter(name)}</text>'


def letter(name: str) -> str:
    """A mathematical letter within a line of text."""
    return f'<tspan font-family="{SERIF}" font-style="italic">{name}</tspan>'


if __name__ == "__main__":
    sys.exit(main())
