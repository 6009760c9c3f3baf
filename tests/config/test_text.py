"""Text, paths and slips of the command line: taken whole, expanded, answered with what was meant."""

from pathlib import Path

import pytest

from acmix.config import Config, load_config
from acmix.config.kinds import is_text, path_keys
from acmix.errors import UserError
from acmix.paths import expand_path, missing_path_hint

BASE = "model: {name: test}\ndata: {dataset: folder, root: images}\nschedule: {epochs: 3}\n"
AWKWARD = [
    "runs/exp #2", "a: b", "{a", "{a: 1}", "[1, 2]", "*star", "&and", "!bang", "%percent", "@at", "`tick", "- dash",
    "? ask", "| bar", "> more", " leading", "trailing ", "123", "1e3", "0x10", "true", "no", "None", "2024-01-01",
    "été", "数据", "🙂 run", "a'b", 'say "so"', "'a' and 'b'", '"a" #b"', "a=b", "tab\there", "a  b " * 40, "---",
    "x,y", ".",
]  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def refusal(base: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(base, overrides)
    return str(caught.value)


def needed(key: str) -> list[str]:
    """The override without which the key has no effect."""
    return ["precision.compile=true"] if key == "compile_cache" else []


@pytest.mark.parametrize("text", AWKWARD)
def test_text_from_the_command_line_is_taken_whole_and_survives_the_resolved_config(text: str, base: Path) -> None:
    config = load_config(base, [f"run.dir={text}", f"data.root={text}", f"data.train_split={text}"])
    assert (config.run.dir, config.data.root, config.data.train_split) == (text, text, text)
    again = base.with_name("again.yaml")
    again.write_text(config.dump())
    assert load_config(again) == config


def test_every_key_of_text_takes_what_yaml_would_make_something_else_of(base: Path) -> None:
    taken = 0
    for section, info in Config.model_fields.items():
        for key, field in info.annotation.model_fields.items():  # type: ignore[union-attr]
            if is_text(field.annotation):
                try:
                    config = load_config(base, [f"{section}.{key}=12", *needed(key)])
                    answer = getattr(getattr(config, section), key)
                except UserError as error:
                    answer = str(error)
                assert answer == "12" or "'12'" in answer, (section, key, answer)
                taken += 1
    assert taken > 10


def test_quotes_around_the_whole_and_null_keep_their_meaning(base: Path) -> None:
    for text, expected in (("null", None), ("", None), ('"null"', "null"), ("'#1'", "#1"), ('"a\\tb"', "a\tb")):
        assert load_config(base, [f"run.dir={text}"]).run.dir == expected
    assert load_config(base, ["model.kwargs.colour=#fff"]).model.kwargs == {"colour": "#fff"}
    assert "write 0.1" in refusal(base, "optimizer.lr=0.1 # fast")


def test_home_and_variables_are_expanded_in_every_path(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    keys = list(path_keys(Config))
    assert {("run", "dir"), ("data", "root"), ("model", "checkpoint")} <= set(keys)
    for section, key in keys:
        for text, expected in (
            ("~/x", "/home/me/x"),
            ("$SCRATCH/x", "/scratch/me/x"),
            ("a/${SCRATCH}y", "a//scratch/mey"),
        ):
            config = load_config(base, [f"{section}.{key}={text}", *needed(key)])
            assert getattr(getattr(config, section), key) == expected
        message = refusal(base, f"{section}.{key}=$NOT_SET_HERE/x", *needed(key))
        assert f"command line: {section}.{key}: the environment variable NOT_SET_HERE" in message
    base.write_text(BASE + "run: {dir: $SCRATCH/runs}\n")
    assert load_config(base).run.dir == "/scratch/me/runs"
    base.write_text(BASE + "run: {dir: $NOT_SET_HERE/runs}\n")
    assert f"{base}:4: run.dir: the environment variable NOT_SET_HERE" in refusal(base)
    monkeypatch.setenv("CONFIGS", str(tmp_path))
    base.write_text(BASE)
    assert load_config("$CONFIGS/base.yaml").run.name == "base"


def test_a_dollar_in_a_name_that_exists_or_doubled_is_a_dollar(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a$b").mkdir()
    for text, expected in ((f"{tmp_path}/a$b/new", f"{tmp_path}/a$b/new"), ("x$$y", "x$y"), ("$5", "$5"), ("x$", "x$")):
        config = load_config(base, [f"run.dir={text}"])
        assert config.run.dir == expected
        again = tmp_path / "again.yaml"
        again.write_text(config.dump())
        assert load_config(again) == config


def test_a_value_that_is_not_utf_8_is_refused(base: Path) -> None:
    assert "run.dir" in refusal(base, "run.dir=a\udcff")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("schedule.steps=None", "write null"),
        ("ema.decay=none", "write null"),
        ("augment.auto_augment=None", "write null"),
        ("precision.amp=None", "write none"),
        ("precision.compile=yes", "write true"),
        ("precision.compile=on", "write true"),
        ("precision.compile=0", "write false"),
        ("schedule.epochs=1e3", "write 1000"),
        ("schedule.epochs=1_000", "write 1000"),
        ("schedule.epochs=1,000", "write 1000"),
        ("schedule.steps=4k", "write 4000"),
        ("schedule.epochs=3.0", "write 3"),
        ("optimizer.lr=0,1", "write 0.1"),
        ("ema.decay=99%", "write 0.99"),
        ("augment.scale=0.75,1.33", "write [0.75, 1.33]"),
        ("augment.scale=(0.75, 1.33)", "write [0.75, 1.33]"),
        ("run.probes=paths", "write [paths]"),
        ("run.device=cuda:1", "CUDA_VISIBLE_DEVICES=1"),
        ("run.device=0", "CUDA_VISIBLE_DEVICES=0"),
        ("run.device=mps", "not supported: use cpu"),
        ("run.device=GPU", "write cuda"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(override: str, hint: str, base: Path) -> None:
    assert refusal(base, override).endswith(hint) or hint in refusal(base, override).partition("; ")[2]


def test_a_number_in_the_file_where_text_belongs_is_answered_with_quotes(base: Path) -> None:
    base.write_text(BASE + "run: {name: 123}\n")
    assert 'write it in quotes: "123"' in refusal(base)


def test_digits_that_yaml_does_not_read_are_no_number(base: Path) -> None:
    assert refusal(base, "optimizer.lr=\u0660,\u0661").endswith("(a string)")
    assert refusal(base, "schedule.epochs=\u0663").endswith("(a string)")


def test_a_nul_in_a_path_is_refused_by_its_key(base: Path) -> None:
    base.write_text(BASE + 'run: {dir: "a\\0b"}\n')
    assert "run.dir: must not hold the character NUL, which no path may, got 'a\\x00b'" in refusal(base)


def test_a_missing_path_is_answered_with_the_nearest_or_a_download(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").touch()
    assert missing_path_hint(tmp_path / "weigths.safetensors").endswith(f"nearest: {tmp_path}/weights.safetensors")
    assert missing_path_hint(tmp_path / "weight.safetensors" / "x").endswith(f"nearest: {tmp_path}/weights.safetensors")
    for address in ("https://example.org/a.pth", "hf-hub:timm/resnet18", "s3://bucket/a.pth"):
        assert "download" in missing_path_hint(address)
        assert "download" in missing_path_hint(Path(address))


def test_a_path_that_is_a_link_to_nothing_keeps_its_dollar(tmp_path: Path) -> None:
    (tmp_path / "l$ink").symlink_to("nowhere")
    assert expand_path(f"{tmp_path}/l$ink", "--out") == f"{tmp_path}/l$ink"
