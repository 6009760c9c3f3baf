"""A network as an exported program of PyTorch."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

_LARGER_BATCH = re.compile(r"L\['\w+'\]\.size\(\)\[0\] > 1")

METADATA = "acmix.json"
"""Name of the extra file in a .pt2 archive that holds the metadata, a JSON object."""


def trace(model: nn.Module, images: Tensor, *, any_size: bool) -> ExportedProgram:
    """The graph of a network for any number of images.

    Args:
        model: In evaluation mode, of PyTorch's own operations.
        images: (B, C, H, W), B at least 2.
        any_size: Whether height and width may be any.

    Raises:
        torch._dynamo.exc.UserError: where the network's steps depend on a size that may be any.
    """
    dynamic = {0: Dim.DYNAMIC, **({2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if any_size else {})}
    # without this a graph is for maps of several tiles, or of just one, as the example has
    any_count = torch.fx.experimental._config.patch(backed_size_oblivious=any_size)  # type: ignore[attr-defined]
    with torch.no_grad(), any_count, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (images,), dynamic_shapes=(dynamic,))
    # A convolution's memory format is asked for as if batches were of at least two; nothing else follows from it.
    program._guards_code = [guard for guard in program._guards_code if not _LARGER_BATCH.fullmatch(guard)]
    return program


def save_program(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a .pt2 file, which `torch.export.load` reads without our package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that share memory
        torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})


def load_program(path: Path, *, check_guards: bool = True) -> nn.Module:
    """The network in a .pt2 file; with `check_guards`, as by default, it refuses sizes that it was not traced for."""
    return torch.export.load(path).module(check_guards=check_guards)


def count_nodes(program: ExportedProgram) -> int:
    """Operations of the graph."""
    return sum(node.op == "call_function" for node in program.graph.nodes)
