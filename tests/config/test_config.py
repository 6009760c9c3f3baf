"""The config file: what is refused, how it is named, and that nothing is lost on the way to disk and back."""

import copy
import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from acmix.config import Config, json_schema, load_config
from acmix.config.errors import schema_keys
from acmix.config.yaml import write_yaml
from acmix.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BASE = """\
model: {name: acmix_resnet26}
data: {dataset: digits}
schedule: {epochs: 3}
"""
REFUSED = "every key misspelt, of a wrong type, out of range or null is refused by name, before any data is read"
SCHEMA = json.loads(json_schema())
KEYS = [path for path in schema_keys(Config) if len(path) == 2]


COMPLETE = yaml.safe_load(Config.model_validate(yaml.safe_load(BASE)).dump())


def complete_values() -> dict[str, Any]:
    """Every key of the schema with a valid value, to be changed at will."""
    return copy.deepcopy(COMPLETE)


def field_schema(section: Any, key: Any) -> tuple[list[dict[str, Any]], bool]:
    """JSON schema of each form that one key takes, null aside, and whether null is allowed."""
    field = SCHEMA["$defs"][SCHEMA["properties"][section]["$ref"].rsplit("/", 1)[1]]["properties"][key]
    options = forms(field)
    kept = [option for option in options if option.get("type") != "null"]
    return kept, len(kept) < len(options)


def forms(field: dict[str, Any]) -> list[dict[str, Any]]:
    """The members of a union in a JSON schema, also of one within another."""
    members = field.get("anyOf") or field.get("oneOf")
    return [form for member in members for form in forms(member)] if members else [field]


def wrong_types(*fields: dict[str, Any]) -> list[Any]:
    """Values of every type that none of a key's forms takes."""
    samples: dict[str, list[Any]] = {
        "integer": [7],
        "number": [0.5],
        "string": ["12", "5e-4", "true", "text"],
        "boolean": [True, False],
        "array": [[], [1]],
        "object": [{}, {"a": 1}],
    }
    accepted = {field["type"] for field in fields}
    accepted |= {"integer"} if "number" in accepted else set()
    return [value for kind, values in samples.items() if kind not in accepted for value in values]


def out_of_range(field: dict[str, Any]) -> list[Any]:
    """Values of the right type that break a limit of the field, from the limits in the schema."""
    found: list[Any] = []
    if field["type"] in ("integer", "number"):
        found += [field[name] - 1 for name in ("minimum",) if name in field]
        found += [field[name] + max(1, field[name] // 2) for name in ("maximum",) if name in field]
        found += [field[name] for name in ("exclusiveMinimum", "exclusiveMaximum") if name in field]
        found += [-math.inf, math.inf, math.nan] if field["type"] == "number" else []
    elif "enum" in field:
        found += ["", field["enum"][0] + "x", field["enum"][0].upper()]
    elif field["type"] == "string":
        found += [""] if "minLength" in field or "pattern" in field else []
        found += ["not/valid"] if "pattern" in field else []
    elif field["type"] == "array":
        items = field.get("prefixItems") or [field["items"]] * field.get("minItems", 1)
        good = [0.5] * len(items)
        found += [good[:-1], good * 4] if "minItems" in field else []
        found += [[bad, *good[1:]] for bad in (*out_of_range(items[0]), *wrong_types(items[0]), None)]
    return found


def mutated(section: Any, key: Any, value: Any) -> dict[str, Any]:
    """The smallest valid config but for this one key."""
    values = yaml.safe_load(BASE)
    values.setdefault(section, {})[key] = value
    return values


def refusal(values: Any, folder: Path) -> str:
    """The message with which the config is refused; fails the test when it is accepted."""
    path = folder / "mutant.yaml"
    path.write_text(values if isinstance(values, str) else write_yaml(values))
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def misspellings(word: str) -> Iterator[str]:
    yield word + "x"
    yield word[:-1] + "_" + word[-1]
    yield word.upper() if word.upper() != word else word + "_"


def test_every_misspelt_key_is_refused_with_the_right_suggestion(tmp_path: Path, report: Callable[..., None]) -> None:
    tried = 0
    for section, key in KEYS:
        for wrong in misspellings(str(key)):
            message = refusal(mutated(section, wrong, COMPLETE[section][key]), tmp_path)
            assert f"{section}.{wrong}: unknown key; nearest valid key: {section}.{key}" in message
            with pytest.raises(UserError, match=f"command line: {section}.{wrong}: .*: {section}.{key}"):
                load_config(ROOT / "configs" / "quickstart.yaml", [f"{section}.{wrong}=1"])
            tried += 2
    for section in complete_values():
        for wrong in misspellings(section):
            values = complete_values()
            values[wrong] = values.pop(section)
            assert f"{wrong}: unknown key; nearest valid key: {section}" in refusal(values, tmp_path)
            tried += 1
    report("config mutations", REFUSED, tried, tried)


def test_every_wrong_type_is_refused_naming_file_line_and_key(tmp_path: Path, report: Callable[..., None]) -> None:
    tried = 0
    for section, key in KEYS:
        for value in wrong_types(*field_schema(section, key)[0]):
            message = refusal(mutated(section, key, value), tmp_path)
            assert f": {section}.{key}" in message, (section, key, value, message)
            assert "mutant.yaml:" in message
            tried += 1
    report("config mutations", REFUSED, tried, tried)


def test_every_value_out_of_range_is_refused_naming_the_key(tmp_path: Path, report: Callable[..., None]) -> None:
    tried = 0
    for section, key in KEYS:
        for value in [value for form in field_schema(section, key)[0] for value in out_of_range(form)]:
            message = refusal(mutated(section, key, value), tmp_path)
            assert f": {section}.{key}" in message, (section, key, value, message)
            tried += 1
    assert tried > len(KEYS)
    report("config mutations", REFUSED, tried, tried)


def test_null_is_refused_wherever_the_schema_does_not_allow_it(tmp_path: Path, report: Callable[..., None]) -> None:
    tried = 0
    for section, key in KEYS:
        if field_schema(section, key)[1]:
            continue
        assert f": {section}.{key}: must " in refusal(mutated(section, key, None), tmp_path)
        tried += 1
    for section in complete_values():
        values = {**complete_values(), section: None}
        assert f": {section}: must be a mapping" in refusal(values, tmp_path)
        tried += 1
    report("config mutations", REFUSED, tried, tried)


def test_every_missing_required_key_is_named(tmp_path: Path) -> None:
    for section, key in (("model", "name"), ("data", "dataset"), ("schedule", "epochs")):
        values = yaml.safe_load(BASE)
        del values[section][key]
        assert f"{section}.{key}: is required" in refusal(values, tmp_path)
        values = yaml.safe_load(BASE)
        del values[section]
        assert f"{section}: is required" in refusal(values, tmp_path)
    assert "model: is required: What is trained." in refusal("", tmp_path)
    assert "model.name: is required: Model name known to timm" in refusal("model: {}\n", tmp_path)


def test_every_section_and_key_has_a_description() -> None:
    for name, reference in SCHEMA["properties"].items():
        section = SCHEMA["$defs"][reference["$ref"].rsplit("/", 1)[1]]
        for key, described in [(None, section), *section["properties"].items()]:
            assert len(described.get("description", "")) > 5, (name, key)


def test_the_schema_file_for_editors_is_current() -> None:
    stored = (ROOT / "configs" / "schema.json").read_text()
    assert stored == json_schema(), "run: python -m acmix.config --schema > configs/schema.json"


CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "studies"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_points_at_the_schema(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.split("=", 1)[1]).resolve() == ROOT / "configs" / "schema.json"
    assert load_config(path).run.name == path.stem


def test_a_dumped_config_loads_back_identical(tmp_path: Path) -> None:
    path = tmp_path / "first.yaml"
    path.write_text(BASE)
    awkward = {"a": "5e-4", "b": "yes", "c": [1, None, 1e-9, "0o17"], "d": {"e": "x: y", "f": "2020-01-01", "g": 1e22}}
    config = load_config(
        path, [f"model.kwargs={json.dumps(awkward)}", "optimizer.betas=[0.9, 0.95]", "data.mean=[0.1, 0.2, 0.3]"]
    )
    again = tmp_path / "again.yaml"
    again.write_text(config.dump())
    assert load_config(again) == config
    assert config.model.kwargs == awkward
    assert yaml.safe_load(config.dump())["model"]["kwargs"]["a"] == "5e-4", "other YAML readers must see a string too"


def test_numbers_follow_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text(BASE + "optimizer: {lr: 5e-4, weight_decay: 1E-2, eps: .5e-8, momentum: 0}\n")
    optimizer = load_config(path).optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.eps, optimizer.momentum) == (5e-4, 1e-2, 5e-9, 0.0)
    assert load_config(path, ["optimizer.lr=2e-3"]).optimizer.lr == 2e-3
    assert "write it without quotes" in refusal(BASE + 'optimizer: {lr: "5e-4"}\n', tmp_path)
    assert "precision.compile: must be true or false" in refusal(BASE + "precision: {compile: yes}\n", tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BASE + "optimizer:\n  lr: 1\n  lr: 2\n", ":6: optimizer.lr: duplicate key, first given on line 5"),
        (BASE + "data: {dataset: folder}\n", ":4: data: duplicate key, first given on line 2"),
        (BASE + "run:\n  dir: !!python/object/apply:os.system ['touch x']\n", ":5: run.dir: the tag !!python/object"),
        (BASE + "run:\n  dir: !!python/name:os.system\n", ":5: run.dir: the tag !!python/name:os.system is refused"),
        (BASE + "run: !include other.yaml\n", ":4: run: the tag !include is refused"),
        (BASE + "run: {seed: !!int ten}\n", ":4: run.seed: 'ten' is not a YAML int"),
        (BASE + "run: &a {seed: 1}\n", ":4: not valid YAML: anchors and aliases are not supported"),
        (BASE + "run: {<<: {seed: 1}}\n", ":4: run.<<: merge keys are not supported"),
        (BASE + "run: {1: 2}\n", ":4: the key 1 in run must be a string"),
        (BASE + "run: {seed: [\n", "not valid YAML"),
        (BASE + "run:\n\tseed: 1\n", ":5: not valid YAML"),
        (BASE + "---\nrun: {seed: 1}\n", ":4: not valid YAML: but found another document"),
        (BASE + "run: {seed: " + "9" * 5000 + "}\n", ":4: run.seed: an integer of 5000 digits is out of range"),
        (BASE + "run: {seed: 1" + "0" * 50 + "}\n", ":4: run.seed: must be at most"),
        (BASE + "optimizer: {lr: 1" + "0" * 400 + "}\n", ":4: optimizer.lr: an integer of 401 digits"),
        (BASE + "model.kwargs: 1\n", ":4: model.kwargs: unknown key"),
        ("[" * 5000, "nested too deeply"),
        ("- a\n- b\n", "a config is a mapping of sections"),
        ("just text\n", "a config is a mapping of sections"),
        ("a: \x00\n", "not valid YAML"),
        ("x" * (1 << 21), "too long"),
    ],
)
def test_broken_yaml_is_refused_naming_file_and_line(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in refusal(text, tmp_path)
    assert not (ROOT / "x").exists()


def test_files_that_are_no_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="not a text file"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr=1", "lr: unknown key; nearest valid key: optimizer.lr"),
        ("optimiser.lr=1", "optimiser.lr: unknown key; nearest valid key: optimizer.lr"),
        ("optimizer.lerning_rate=1", "nearest valid key: optimizer.lr"),
        ("optimizer.lr.x=1", "optimizer.lr.x: unknown key"),
        ("optimizer={lr: 1}", "optimizer is a section"),
        ("optimizer.lr", "not of the form KEY.PATH=VALUE"),
        ("=1", "not of the form KEY.PATH=VALUE"),
        ("optimizer.lr=", "optimizer.lr: must be a number, got null"),
        ("optimizer.lr=-1", "optimizer.lr: must be greater than 0"),
        ("schedule.epochs=ten", "schedule.epochs: must be an integer, got 'ten'"),
        ("schedule.epochs=0", "schedule.epochs: must be at least 1"),
        ("data.batch_size=-4", "data.batch_size: must be at least 1, got -4"),
        ("precision.amp=fp8", "precision.amp: must be one of 'none', 'bf16', 'fp16', got 'fp8'"),
        ("model.kwargs.a.b=.nan", "model.kwargs.a.b: must be a finite number"),
        ("optimizer.kwargs.a.b=.nan", "optimizer.kwargs.a.b: must be a finite number"),
        ("schedule.kwargs=1", "schedule.kwargs: must be a mapping"),
        ("run.dir=!!python/name:os.system", "the tag !!python/name:os.system is refused"),
        ("augment.auto_augment=random", "augment.auto_augment: is not of a valid form, like rand-m9"),
        ("run.name=../elsewhere", "run.name: is not of a valid form"),
    ],
)
def test_overrides_are_checked_like_the_file(override: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    with pytest.raises(UserError) as caught:
        load_config(path, [override])
    assert str(caught.value).startswith("command line: ")
    assert expected in str(caught.value)


def test_overrides_reach_every_level_and_are_refused_twice(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    config = load_config(
        path,
        ["model.kwargs.stem=cifar", "model.kwargs.opts.deep=[1, 2]", "optimizer.kwargs.nesterov=true", "run.dir=a=b"],
    )
    assert config.model.kwargs == {"stem": "cifar", "opts": {"deep": [1, 2]}}
    assert config.optimizer.kwargs == {"nesterov": True}
    assert config.run.dir == "a=b"
    with pytest.raises(UserError, match=r"command line: run.seed: duplicate key"):
        load_config(path, ["run.seed=1", "run.seed=2"])
    with pytest.raises(UserError, match=r"command line: model.kwargs: would undo model.kwargs.heads, given before it"):
        load_config(path, ["model.kwargs.heads=2", "model.kwargs={stem: cifar}"])
    both = load_config(path, ["model.kwargs={stem: cifar}", "model.kwargs.heads=2"])
    assert both.model.kwargs == {"stem": "cifar", "heads": 2}


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.kwargs.num_classes=3"], "model.kwargs.num_classes"),
        (["schedule.warmup_epochs=4"], "schedule.warmup_epochs"),
        (["schedule.min_lr=1", "optimizer.lr=0.1"], "schedule.min_lr"),
        (["schedule.warmup_lr=5", "schedule.warmup_epochs=1"], "schedule.warmup_lr"),
        (["data.dataset=folder"], "data.root"),
        (["data.dataset=cifar10"], "data.root"),
        (["data.download=true"], "data.download"),
        (["data.dataset=digit"], "data.dataset"),
        (["data.dataset=tfds/mnist"], "data.dataset"),
        (["augment.scale=[0.9, 0.1]"], "augment.scale"),
        (["augment.scale=[0.9, 1.1]"], "augment.scale"),
        (["augment.ratio=[2, 1]"], "augment.ratio"),
        (["augment.mixup=0.8", "data.batch_size=7"], "data.batch_size"),
        (["run.min_delta=0.5"], "run.min_delta"),
        (["optimizer.clip_mode=agc"], "optimizer.clip_mode"),
        (["ema.warmup=true"], "ema.warmup"),
        (["precision.compile_cache=compiled"], "precision.compile_cache"),
        (["augment.mixup=0.8", "augment.mixup_prob=0"], "augment.mixup"),
        (["augment.cutmix=1", "augment.mixup_prob=0"], "augment.cutmix"),
        (["optimizer.path_freeze_epochs=3"], "optimizer.path_freeze_epochs"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(overrides: list[str], key: str, tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    with pytest.raises(UserError, match=rf": {key}: "):
        load_config(path, overrides)


def test_a_config_cannot_be_changed_once_loaded(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    config = load_config(path)
    before = copy.deepcopy(config)
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.lr = 1.0  # type: ignore[misc]
    assert config == before


def test_the_command_line_reports_errors_in_one_message_with_status_2(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    for arguments in ([str(path), "optimizer.lr=fast"], [str(tmp_path / "none.yaml")], [str(path), "bogus=1"]):
        done = subprocess.run([sys.executable, "-m", "acmix.config", *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr
    done = subprocess.run([sys.executable, "-m", "acmix.config", str(path)], capture_output=True, text=True)
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["run"]["name"] == "base"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config", "{good}", "optimizer.lerning_rate=1"], "optimizer.lerning_rate"),
        (["--config", "{good}", "data.batch_size=-1", "data.root=/no/such/folder"], "data.batch_size"),
        (["--config", "{good}", "data.dataset=folder", "data.root=/no/such", "schedule.epochs=ten"], "schedule.epochs"),
        (["--config", "{good}", "model.name="], "model.name"),
        (["--config", "{broken}"], "broken.yaml:3: not valid YAML"),
        (["--config", "{missing}"], "missing.yaml"),
    ],
)
def test_train_refuses_a_bad_config_before_anything_else(arguments: list[str], named: str, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(BASE)
    (tmp_path / "broken.yaml").write_text("model:\n  name: [\n")
    paths = {name: str(tmp_path / f"{name}.yaml") for name in ("good", "broken", "missing")}
    command = [sys.executable, str(ROOT / "train.py"), *(argument.format(**paths) for argument in arguments)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.yaml", "good.yaml"]
    processor_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert processor_seconds < 2, "a mistake must be reported within 2 seconds, before torch is imported"


def test_reading_a_config_does_not_import_torch() -> None:
    program = "import sys, acmix.config; sys.exit(any(name in sys.modules for name in ('torch', 'timm', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
