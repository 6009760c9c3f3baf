"""Study files: what they mean and what is refused."""

from pathlib import Path

import pytest

from acmix.errors import UserError
from acmix.studies.plan import plan_run
from acmix.studies.schema import load_study


def test_a_study_says_base_arms_seeds_and_reference(study_file: Path) -> None:
    study = load_study(study_file)
    assert (study.name, study.reference, study.equal) == ("mixes", "learned", "epochs")
    assert study.arms == {"learned": (), "sum": ("model.kwargs.mix=sum",)}
    assert study.seeds == (0, 1, 2)


def test_a_value_may_hold_the_seed(study_file: Path) -> None:
    settings = '{model.checkpoint: "weights/{seed}.safetensors", model.kwargs.mix: {alpha: 0.5}}'
    study_file.write_text(study_file.read_text().replace("{model.kwargs.mix: sum}", settings))
    study = load_study(study_file)
    assert study.settings("sum", 2) == ("model.checkpoint=weights/2.safetensors", 'model.kwargs.mix={"alpha": 0.5}')
    assert plan_run(study, "sum", 2, Path("out"), [], {}).config.model.checkpoint == "weights/2.safetensors"


def test_seeds_are_a_number_or_a_list(study_file: Path) -> None:
    study_file.write_text(study_file.read_text().replace("seeds: 3", "seeds: [7, 0]"))
    assert load_study(study_file).seeds == (7, 0)


def test_base_is_a_path_from_the_folder_of_the_study_file(study_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = study_file.parent / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    assert load_study(Path("../mixes.yaml")).base == Path("../base.yaml")
    (below / "here.yaml").write_text("")
    study_file.write_text(study_file.read_text().replace("base.yaml", "here.yaml"))
    with pytest.raises(UserError, match=r"no config \.\./here.yaml; it is a path from .*; write below/here.yaml"):
        load_study(Path("../mixes.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: 3", "seeds: 3\nequals: time", r"mixes.yaml:5: equals: unknown key; nearest valid key: equal"),
        ("seeds: 3", "seeds: 3\nequal: hours", r"equal: must be one of 'epochs', 'time', 'multiply_adds'"),
        ("seeds: 3", "", r"seeds: is required"),
        ("seeds: 3", "seeds: 0", r"mixes.yaml:4: seeds: must be their number, such as 3"),
        ("seeds: 3", "seeds: true", r"seeds: must be their number"),
        ("seeds: 3", "seeds: [1, 1]", r"seeds: must be .* a list of different integers"),
        ("reference: learned", "reference: learnt", r"mixes.yaml:5: reference: there is no arm 'learnt'; nearest"),
        ("name: mixes", "name: a/b", r"mixes.yaml:2: name: is not of a valid form, like mixes, got 'a/b'"),
        ("sum: {", "sum/2: {", r"arms.sum/2: the name becomes that of a folder"),
        ("{model.kwargs.mix: sum}", "[model.kwargs.mix=sum]", r"mixes.yaml:8: arms.sum: must be a mapping of"),
        ("{model.kwargs.mix: sum}", "{optimizer.lrr: 1.0}", r"optimizer.lrr: .* nearest valid key: optimizer.lr"),
        ("{model.kwargs.mix: sum}", "{run.seed: 1}", r"arms.sum: run.seed is set by the study"),
        ("{model.kwargs.mix: sum}", "{data.root: 5}", r"arms.sum: data.root: 5 is no value of this key"),
        ("{model.kwargs.mix: sum}", "{model.kwargs: {}, model.kwargs.mix: sum}", r"model.kwargs and .*mix set the sam"),
        ("base: base.yaml", "base: bse.yaml", r"there is no config .*bse.yaml; .*nearest: .*base.yaml"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_with_its_place(study_file: Path, old: str, new: str, message: str) -> None:
    study_file.write_text(study_file.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        load_study(study_file)
