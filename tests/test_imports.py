"""The arrows of CONTRIBUTING.md: which room may import which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("acmix", "benchmarks", "examples", "models", "scripts")

# Room → the rooms of ours it may import. A room is a path prefix of the module; the longest prefix that matches counts.
# acmix.errors, acmix.paths, acmix.cores and acmix.json_text are leaves that every room may import.
ALLOWED: dict[str, tuple[str, ...]] = {
    "acmix.errors": (),
    "acmix.paths": (),
    "acmix.cores": (),
    "acmix.json_text": (),
    "acmix.config": (),
    "acmix.config.__main__": ("acmix.config", "acmix.process"),
    "acmix.ops.reference": (),
    "acmix.ops.maps": (),
    "acmix.ops.implementations": ("acmix.ops.maps",),
    "acmix.ops": (),
    "acmix.layers": ("acmix.ops",),
    "acmix.models": ("acmix.layers", "acmix.ops", "acmix.checkpoint.fit", "acmix.checkpoint.state_dict"),
    "acmix.checkpoint": (),
    "acmix.process": ("acmix.config",),
    "acmix.data": ("acmix.config", "acmix.checkpoint.atomic"),
    "acmix.analysis": ("acmix.layers", "acmix.ops"),
    "acmix.telemetry": ("acmix.analysis", "acmix.checkpoint.atomic", "acmix.layers", "acmix.ops"),
    "acmix.engine": (
        "acmix.checkpoint",
        "acmix.process",
        "acmix.data",
        "acmix.telemetry",
        "acmix.analysis",
        "acmix.layers",
        "acmix.config",
        "acmix.ops.native",
    ),
    "acmix.export": (
        "acmix.analysis",
        "acmix.checkpoint",
        "acmix.config",
        "acmix.data",
        "acmix.engine",
        "acmix.layers",
        "acmix.models",
        "acmix.ops",
        "acmix.process",
        "acmix.telemetry",
    ),
    "acmix.studies": (
        "acmix.checkpoint.atomic",
        "acmix.config",
        "acmix.data",
        "acmix.engine",
        "acmix.models",
        "acmix.process",
        "acmix.telemetry",
    ),
    "acmix.report": (
        "acmix.checkpoint.atomic",
        "acmix.config",
        "acmix.data",
        "acmix.engine",
        "acmix.export.load",
        "acmix.studies",
        "acmix.telemetry",
    ),
    "acmix.integrations": ("acmix.layers",),
    "acmix.compat": ("acmix.layers",),
    "acmix.testing": ("acmix.layers", "acmix.ops"),
    "acmix.launch": ("acmix.process",),
    "acmix": ("acmix.layers",),
    "benchmarks": ("acmix",),
    "examples": ("acmix",),
    "models": ("acmix.models",),
    "scripts": ("acmix", "benchmarks"),
}


def room_of(module: str) -> str | None:
    """The longest prefix of `module` in ALLOWED, or None for a module that is not ours."""
    matches = [room for room in ALLOWED if module == room or module.startswith(room + ".")]
    return max(matches, key=len, default=None)


def imported_modules(path: Path) -> set[str]:
    """Every module that the file imports, at the top or inside a function, as absolute names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the project writes absolute ones"
            base = node.module or ""
            names.add(base)
            for alias in node.names:
                target = ROOT / Path(*base.split("."), alias.name)
                if target.with_suffix(".py").exists() or target.is_dir():
                    names.add(f"{base}.{alias.name}")
    return names


def module_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", module_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_the_rooms_it_may(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    room = room_of(module)
    assert room is not None
    allowed = (*ALLOWED[room], "acmix.errors", "acmix.paths", "acmix.cores", "acmix.json_text", room)
    for name in imported_modules(path):
        target = room_of(name)
        if target is None or name == "acmix":
            continue
        assert any(name == prefix or name.startswith(prefix + ".") for prefix in allowed), (
            f"{module} imports {name}, but {room} may import only {', '.join(allowed)}"
        )


def test_entry_points_are_wiring_only() -> None:
    for name in ("train.py", "eval.py"):
        lines = (ROOT / name).read_text().splitlines()
        assert len(lines) < 100, f"{name} has {len(lines)} lines; logic belongs in acmix/engine"
