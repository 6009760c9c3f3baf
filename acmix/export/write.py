"""Export: trace, fold, write, check against PyTorch, and say what the same is unfolded."""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError as TracingError
from torch.export import ExportedProgram

from acmix import __version__
from acmix.checkpoint.atomic import replacing
from acmix.errors import UserError, one_line
from acmix.export.check import LIMIT, Run, largest_difference, median_milliseconds
from acmix.export.load import Trained
from acmix.export.onnx import OnnxNetwork, save_onnx
from acmix.export.preprocessing import Preprocessing
from acmix.export.program import count_nodes, load_program, save_program, trace
from acmix.export.standard import standard
from acmix.layers import WindowAttention
from acmix.process.program import RunFailure

Format = Literal["onnx", "pt2"]
Step = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """A file that was written: number of operations, size, and what it computes."""

    nodes: int
    megabytes: float
    run: Run


def export(
    trained: Trained, images: Tensor, form: Format, out: Path, *, fixed_size: bool = False, step: Step = lambda _: None
) -> dict[str, Any]:
    """Write the network to `out` once it has proved to compute the same; returns what `scripts/export.py` prints.

    Args:
        trained: The network; it is moved to the CPU.
        images: At least three, (B, C, H, W), on which the file is checked.
        form: `onnx` or `pt2`.
        out: The file to write.
        fixed_size: Take images of that one size only, also where the family allows any.
        step: Told what is done next.

    Raises:
        RunFailure: where a logit differs by more than `check.LIMIT`; no file is left then.
        UserError: where the file cannot be written, packages are missing, or the network has diverged.
    """
    model = trained.model.float().cpu().eval()
    with torch.inference_mode():
        if not model(images).isfinite().all():
            raise UserError(
                f"{trained.path}: its logits are not finite: it has diverged; give a checkpoint from before"
            )
    metadata = _metadata(trained)

    def write(any_size: bool) -> tuple[Written, float]:
        step("tracing")
        program = trace(standard(model, images, any_size=any_size), images[:2], any_size=any_size)
        with replacing(out, make_parents=True) as temporary:
            step("writing")
            written = _write(program, form, temporary, metadata, any_size)
            step("checking")
            difference = largest_difference(written.run, model, images, any_size=any_size)
            if difference > LIMIT:
                raise RunFailure(
                    f"{out}: not written: its logits differ from PyTorch's by {difference:.1e}, more than {LIMIT:.0e}; "
                    "try the other --format"
                )
        return written, difference

    any_size = not fixed_size and _may_allow_any_size(model)
    try:
        folded, difference = write(any_size)
    except (TracingError, UserError, AssertionError) as error:  # AssertionError: a .pt2 file refuses a size
        if not any_size:
            raise
        print(f"note: the file takes {_sides(images)} only: {one_line(error)}", file=sys.stderr)
        any_size = False
        folded, difference = write(any_size)
    step("measuring it unfolded")
    unfolded = trace(standard(model, images, fold=False, any_size=any_size), images[:2], any_size=any_size)
    with tempfile.TemporaryDirectory() as folder:
        plain = _write(unfolded, form, Path(folder, f"unfolded{out.suffix}"), metadata, any_size, check_guards=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = median_milliseconds([folded.run, plain.run], images[:1])
    finally:
        torch.set_num_threads(threads)
    return {
        "out": str(out),
        "format": form,
        "checkpoint": str(trained.path),
        "model": trained.config.model.name,
        "classes": len(trained.classes),
        "size": list(images.shape[2:]),
        "dynamic": ["batch", "height", "width"] if any_size else ["batch"],
        "largest_difference": difference,
        **_cost(folded, times[0]),
        "unfolded": _cost(plain, times[1]),
    }


def _cost(written: Written, milliseconds: float) -> dict[str, Any]:
    return {
        "nodes": written.nodes,
        "megabytes": round(written.megabytes, 3),
        "milliseconds": round(milliseconds, 3),
    }


def _metadata(trained: Trained) -> dict[str, str]:
    return {
        "classes": json.dumps(trained.classes),
        **Preprocessing.of(trained.config).metadata(),
        "model": trained.config.model.name,
        "acmix": __version__,
    }


def _may_allow_any_size(model: nn.Module) -> bool:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    windows = any(isinstance(module, WindowAttention) for module in model.modules())
    return not cfg.get("fixed_input_size") and not windows


def _sides(images: Tensor) -> str:
    return f"images of {images.shape[2]}×{images.shape[3]}"


def _write(
    program: ExportedProgram,
    form: Format,
    path: Path,
    metadata: dict[str, str],
    any_size: bool,
    *,
    check_guards: bool = True,
) -> Written:
    """Write the file and open it; `check_guards` as in `load_program`."""
    run: Run
    if form == "onnx":
        nodes = save_onnx(program, path, metadata, any_size=any_size)
        session = OnnxNetwork(path, threads=1)
        run = lambda images: torch.from_numpy(session(images.numpy()))  # noqa: E731
    else:
        save_program(program, path, metadata)
        nodes, run = count_nodes(program), load_program(path, check_guards=check_guards)
    return Written(nodes, path.stat().st_size / 1e6, run)
