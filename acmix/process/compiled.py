"""Where torch.compile keeps what it made, so that another start of a run need not make it again."""

import fcntl
import hashlib
import os
import shutil
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# Asked for at the start: PyTorch writes its own choice there when it compiles for the first time.
_GIVEN = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
_BUILDING = "_CxxBuild"  # end of the name of the folder in which Inductor builds a library


def keep_compiled(folder: Path) -> None:
    """Let Inductor and Triton keep below `folder` what they compile from now on, unless the environment says where.

    They find it again by the graph and the version of torch. An operation of ours is one node of a graph, whatever its
    code; so every state of the package has a folder of its own. What a process was killed over is made anew.
    """
    place = folder / package_fingerprint()
    for name, given in _GIVEN.items():
        os.environ[name] = given or str(place / name.split("_")[0].lower())
    _drop_unfinished(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))


def _drop_unfinished(place: Path) -> None:
    """Remove the libraries that nobody builds any more: Inductor takes any file of the right name for finished."""
    for building in place.glob(f"*/*{_BUILDING}"):
        library = building.name.removesuffix(_BUILDING)
        lock = place / "locks" / f"{library.partition('.')[0]}.lock"
        lock.parent.mkdir(exist_ok=True)
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # a run beside this one is at it
                continue
            if not building.is_dir():  # it has just finished
                continue
            for part in building.parent.glob(f"{library}.*"):
                part.unlink(missing_ok=True)
            shutil.rmtree(building, ignore_errors=True)


@cache
def package_fingerprint() -> str:
    """Changes with every change of the package's sources."""
    files = sorted(file for file in _PACKAGE.rglob("*") if file.suffix in (".py", ".cpp", ".h"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
