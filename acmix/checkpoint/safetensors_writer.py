"""Writes weights in the safetensors format without holding the interpreter lock, so that training goes on meanwhile."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from acmix.checkpoint.manifest import HashingFile

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_safetensors(weights: Mapping[str, Tensor], file: HashingFile) -> None:
    """Write CPU tensors as a safetensors file, in row-major order whatever their strides.

    The safetensors library holds the interpreter lock for the whole file (measured: 0.12 to 0.3 s for 64 MB), which
    stops the training loop; here every large write releases it. The result is an ordinary file for the library to read.
    Raises TypeError, naming the tensor, for a dtype that is not saved.
    """
    # Widest elements first, as the library does: every tensor then starts aligned to its own element size.
    names = sorted(weights, key=lambda name: (-weights[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = weights[name]
        if tensor.dtype not in _DTYPE_NAMES:
            raise TypeError(f"{name}: cannot be saved as safetensors: dtype {tensor.dtype}")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        flat = weights[name].contiguous().reshape(-1)
        if flat.numel():
            file.write(flat.view(torch.uint8).numpy().data)
