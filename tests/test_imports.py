"""The arrows of CONTRIBUTING.md: which room may import which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("acmix", "models", "scripts")

# Room → the rooms of ours it may import. A room is a path prefix of the module; the longest prefix that matches counts.
# acmix.errors is a leaf that every room may import.
ALLOWED: dict[str, tuple[str, ...]] = {
    "acmix.errors": (),
    "acmix.strict_yaml": (),
    "acmix.config_errors": ("acmix.strict_yaml",),
    "acmix.config": ("acmix.strict_yaml", "acmix.config_errors"),
    "acmix.ops.reference": (),
    "acmix.ops.dispatch": (),
    "acmix.ops": ("acmix.ops",),
    "acmix.layers": ("acmix.layers", "acmix.ops"),
    "acmix.data": ("acmix.data", "acmix.config"),
    "acmix.telemetry.paths": ("acmix.layers",),
    "acmix.telemetry": ("acmix.telemetry", "acmix.ops", "acmix.layers"),
    "acmix.engine": ("acmix.engine", "acmix.data", "acmix.telemetry", "acmix.config"),
    "acmix.benchmark": ("acmix.benchmark", "acmix.telemetry", "acmix.layers", "acmix.ops", "models"),
    "acmix.testing": ("acmix.ops",),
    "acmix": ("acmix",),
    "models": ("models", "acmix.layers", "acmix.ops"),
    "scripts": ("acmix", "models", "scripts"),
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
    allowed = (*ALLOWED[room], "acmix.errors", room)
    for name in imported_modules(path):
        target = room_of(name)
        if target is None or name == "acmix":
            continue
        assert any(name == prefix or name.startswith(prefix + ".") for prefix in allowed), (
            f"{module} imports {name}, but {room} may import only {', '.join(allowed)}"
        )


def test_engine_layers_and_data_never_import_models() -> None:
    for package in ("engine", "layers", "data", "ops", "telemetry"):
        for path in (ROOT / "acmix" / package).rglob("*.py"):
            found = [name for name in imported_modules(path) if name.split(".")[0] == "models"]
            assert not found, f"{path} imports {found}"


def test_entry_points_are_wiring_only() -> None:
    for name in ("train.py", "eval.py"):
        lines = (ROOT / name).read_text().splitlines()
        assert len(lines) < 100, f"{name} has {len(lines)} lines; logic belongs in acmix/engine"
