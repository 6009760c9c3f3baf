"""A network as ONNX, with standard operators only."""

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from acmix.errors import UserError, one_line

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OPSET = 20
"""The first with an operator for GELU."""

INPUT, OUTPUT = "images", "logits"
_AXES = {0: "batch", 2: "height", 3: "width"}


def require_onnx(*packages: str) -> None:
    """Raise UserError unless the packages, those of the extra by default, are installed."""
    missing = [package for package in packages or PACKAGES if find_spec(package) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)} not installed; ONNX files need "
            'pip install "acmix[export]" (in a checkout: pip install -e ".[export]")'
        )


def save_onnx(program: ExportedProgram, path: Path, metadata: Mapping[str, str], *, any_size: bool) -> int:
    """Write an ONNX file whose input `images` and output `logits` are float32; returns the number of its nodes.

    The metadata are its `metadata_props`. Raises UserError for a graph that holds other than standard operators.
    """
    axes = _AXES if any_size else {0: _AXES[0]}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            converted = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamic_shapes=(axes,),
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = one_line(error.__cause__ or error)
            raise UserError(f"PyTorch cannot write this network as ONNX: {reason}; use --format pt2") from error
    assert converted is not None
    model = converted.model
    nodes = list(model.graph.all_nodes())
    others = sorted({f"{node.domain}::{node.op_type}" for node in nodes if node.domain not in ("", "ai.onnx")})
    if others or model.functions:
        raise UserError(f"operators that are not standard ONNX: {', '.join(others)}; use --format pt2")
    for node in nodes:
        node.metadata_props.clear()  # stack traces, longer than the graph
        for value in node.outputs:
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    converted.save(path, external_data=False)
    return len(nodes)


class OnnxNetwork:
    """An ONNX file in onnxruntime, on the CPU: images (B, C, H, W) to logits (B, classes), float32.

    Raises UserError for a file that is not one of ours, or where onnxruntime is not installed.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        require_onnx("onnxruntime")
        import onnxruntime

        self._path = path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it would print of an error is in the exception
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except _refusals() as error:
            raise UserError(f"{path}: onnxruntime cannot read it: {one_line(error)}") from None
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        names = [entry.name for entry in self._session.get_inputs()]
        if names != [INPUT]:
            raise UserError(f"{path}: its inputs are {', '.join(names)}, not {INPUT}; give a file of scripts/export.py")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        try:
            logits: np.ndarray = self._session.run([OUTPUT], {INPUT: images})[0]
        except _refusals() as error:
            raise UserError(f"{self._path}: not for images of shape {images.shape}: {one_line(error)}") from None
        return logits


def _refusals() -> tuple[type[Exception], ...]:
    """What onnxruntime raises for a file or an input that it refuses; these exceptions have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as raised

    of_graph = raised.InvalidArgument, raised.InvalidGraph, raised.NotImplemented, raised.RuntimeException
    return raised.Fail, raised.InvalidProtobuf, raised.NoSuchFile, *of_graph
