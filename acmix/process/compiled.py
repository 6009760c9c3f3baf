"""Where torch.compile keeps what it made, so that another start of a run need not make it again."""

import hashlib
import os
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# Asked for at the start: PyTorch writes its own choice there when it compiles for the first time.
_GIVEN = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}


def keep_compiled(folder: Path) -> None:
    """Let Inductor and Triton keep below `folder` what they compile from now on, unless the environment says where.

    They find it again by the graph and the version of torch. An operation of ours is one node of a graph, whatever its
    code; so every state of the package has a folder of its own.
    """
    place = folder / package_fingerprint()
    for name, given in _GIVEN.items():
        os.environ[name] = given or str(place / name.split("_")[0].lower())


@cache
def package_fingerprint() -> str:
    """Changes with every change of the package's sources."""
    files = sorted(file for file in _PACKAGE.rglob("*") if file.suffix in (".py", ".cpp", ".h"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
