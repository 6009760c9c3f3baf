"""What a person installs and imports: the wheel, the block with torch alone, the two names of the models."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {".py", ".cpp", ".h", ".typed", ".html", ".css"}
BLOCK = """
import torch
from acmix import ACmix

block = ACmix(8, 16, heads=2, kernel_att=3, stride=2)
x = torch.randn(1, 8, 6, 6, requires_grad=True)
block(x).sum().backward()
assert x.grad.shape == x.shape and all(p.grad is not None for p in block.parameters())
"""


def run_python(code: str, folder: Path, *arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run code in a new process that works in `folder` and finds modules there first, then in `path`."""
    env = {**os.environ, "PYTHONPATH": str(path), "ACMIX_COMPILE": "never"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def ran(done: subprocess.CompletedProcess[str]) -> str:
    """The output of a process that must have succeeded."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def requirements_of(name: str) -> set[str]:
    """The distributions that installing `name` without extras brings, `name` included, where they are installed."""
    found, waiting = set(), [name]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines if "extra ==" not in line]
    return found


@pytest.fixture(scope="module")
def only_torch() -> str:
    """Code that makes whatever is installed unimportable, except acmix, torch and what torch requires."""
    kept = requirements_of("torch") | {"acmix"}
    hidden = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not kept & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
    }
    assert {"timm", "pydantic", "yaml"} <= hidden
    return f"""
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {sorted(hidden)} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hiding, sys.meta_path)
"""


@pytest.mark.parametrize("module", ["acmix.models", "acmix.config"])
def test_the_rest_says_which_command_installs_what_it_needs(only_torch, tmp_path, module):
    code = f"try:\n import {module}\nexcept ImportError as error:\n print(type(error).__name__, error.name, error)"
    output = ran(run_python(only_torch + code, tmp_path))
    assert re.match(r'MissingPackageError (timm|pydantic|yaml) .*pip install "acmix\[train\]"', output)


@pytest.mark.parametrize("arguments", [("train.py", "--config", "x.yaml"), ("eval.py", "--checkpoint", "x")])
def test_the_programs_say_so_in_one_message(only_torch, arguments):
    code = only_torch + "import runpy\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    done = run_python(code, ROOT, *arguments)
    assert done.returncode == 2
    assert re.fullmatch(r'error: \w+ is not installed; .*pip install "acmix\[train\]".*\n', done.stderr)


def run_file(launcher: Any, folder: Path, code: str) -> str:
    """The output of code run as a file of `folder`, in a process that has loaded none of our modules."""
    program = folder / "program.py"
    program.write_text(code)
    ended = launcher.start(program, folder=folder, fresh=True)
    assert ended.wait() == 0, ended.errors
    return ended.output


def test_the_models_register_in_a_project_that_has_models_of_its_own(tmp_path, launcher):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("OURS = False\n")
    code = "import models, acmix.models, timm; print(models.OURS, timm.is_model('acmix_resnet26'))"
    assert run_file(launcher, tmp_path, code) == "False True\n"


@pytest.mark.parametrize("imports", ["models.acmix_resnet, acmix.models", "acmix.models, models.acmix_resnet"])
def test_models_in_the_checkout_is_the_same_module_registered_once(imports, tmp_path, launcher):
    code = f"""
import sys
import warnings
assert not [name for name in sys.modules if name.startswith(("acmix", "models"))]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import {imports}
    from models.factory import create_model
assert models is acmix.models and models.acmix_resnet is acmix.models.acmix_resnet
assert create_model is acmix.models.create_model
assert not [str(warning.message) for warning in caught if "Overwriting" in str(warning.message)]
"""
    run_file(launcher, tmp_path, code)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the checkout, built from a copy so that an old build folder cannot leak into it."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.name in ("acmix", "benchmarks", "models", "scripts", "tests"):
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy(path, source)
    ran(run_python("import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])", source, ".."))
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_with_its_sources_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"acmix", info}
    packaged = {name for name in names if name.startswith("acmix/")}
    files = [path for path in (ROOT / "acmix").rglob("*") if path.suffix in SHIPPED]
    assert packaged == {path.relative_to(ROOT).as_posix() for path in files}
    assert {Path(name).suffix for name in packaged} == SHIPPED
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_states_its_version_licence_and_one_requirement_with_which_the_block_works(
    wheel, only_torch, tmp_path
):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = only_torch + "import acmix\nprint(acmix.__version__, acmix.__file__)" + BLOCK
    version, file = ran(run_python(code, tmp_path, path=tmp_path)).split()
    assert Path(file).is_relative_to(tmp_path)
    (distribution,) = metadata.distributions(path=[str(tmp_path)])
    assert distribution.version == version
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    needed = [line for line in distribution.requires or [] if "extra ==" not in line]
    assert [re.match(r"\w+", line)[0] for line in needed] == ["torch"]
