"""Programs that know nothing of these networks, started by `python -m acmix.models`."""

import runpy
import sys

import pytest


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["acmix.models", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_module("acmix.models", run_name="__main__", alter_sys=True)


def test_a_program_gets_its_arguments_and_our_names(monkeypatch, tmp_path, capsys):
    (tmp_path / "near.py").write_text("FOUND = 'acmix_resnet26'\n")
    program = tmp_path / "program.py"
    program.write_text("import sys, timm, near\nprint(sys.argv[1:], timm.is_model(near.FOUND), __name__)\n")
    start(monkeypatch, str(program), "--batch", "2")
    assert capsys.readouterr().out == "['--batch', '2'] True __main__\n"


@pytest.mark.parametrize("arguments", [[], ["nowhere.py"]], ids=str)
def test_without_a_program_the_usage_is_shown(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        start(monkeypatch, *arguments)
    assert left.value.code == 2
    errors = capsys.readouterr().err
    assert "python -m acmix.models PROGRAM.py" in errors
    assert "no such program" in errors
