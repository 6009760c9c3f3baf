"""ONNX by PyTorch's two exporters, which other people's exporters call."""

import io
import warnings

import numpy as np
import pytest
import torch

from acmix import ACmix

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_exported_block_gives_what_the_block_gives(dynamo):
    torch.manual_seed(0)
    block, images, file = ACmix(3, 8, heads=2, stride=2).eval(), torch.randn(1, 3, 16, 20), io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tracing makes constant
        torch.onnx.export(block, (images,), file, dynamo=dynamo, input_names=["images"])
        expected = block(images)
    [found] = onnxruntime.InferenceSession(file.getvalue()).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
