"""The verdicts on what may change at a resume: one for each key, and what is said of a change."""

import pytest

from acmix.config import Config
from acmix.config.errors import schema_keys
from acmix.config.resume import VERDICTS, changed_keys, describe_changes, refuse_fixed, settled
from acmix.config.yaml import dotted
from acmix.errors import UserError

BASE = {"model": {"name": "test"}, "data": {"dataset": "digits"}, "schedule": {"epochs": 3}}


def config(**sections: dict) -> Config:
    return Config.model_validate({key: {**BASE.get(key, {}), **sections.get(key, {})} for key in {**BASE, **sections}})


def test_every_key_of_the_schema_has_a_verdict_and_no_verdict_is_without_a_key() -> None:
    keys = {dotted(path) for path in schema_keys(Config) if len(path) == 2}
    assert keys - VERDICTS.keys() == set(), "say in acmix/config/resume.py whether this key may change at a resume"
    assert {key for key in VERDICTS if not key.startswith("model.kwargs.")} <= keys


def test_a_config_of_an_older_or_newer_schema_is_held_against_defaults() -> None:
    saved = config().model_dump(mode="json")
    del saved["ema"], saved["optimizer"]["path_lr_factor"]
    saved["run"]["gone"] = 1
    saved["optimizer"]["kwargs"] = {"nesterov": True}
    assert changed_keys(saved, config(optimizer={"kwargs": {"nesterov": True}})) == {}
    assert changed_keys(saved, config(ema={"decay": 0.9}))["ema.decay"] == (None, 0.9)
    assert changed_keys(None, config()) == {}


def test_a_change_is_told_with_what_it_brings() -> None:
    saved = config(ema={"decay": 0.9}).model_dump(mode="json")
    [dropped] = describe_changes(changed_keys(saved, config()))
    assert dropped == "Changed: ema.decay was 0.9, now null; the average is dropped"
    [longer] = describe_changes(changed_keys(config().model_dump(mode="json"), config(schedule={"epochs": 4})))
    assert "schedule.epochs was 3, now 4; the learning rate follows the new schedule" in longer
    [impl] = describe_changes(
        changed_keys(config().model_dump(mode="json"), config(model={"kwargs": {"impl": "reference"}}))
    )
    assert impl == "Changed: model.kwargs.impl was null, now reference"


def test_a_network_of_other_arguments_is_refused_even_if_the_weights_fit() -> None:
    changes = changed_keys(config(model={"kwargs": {"heads": 4}}).model_dump(mode="json"), config(model={"kwargs": {}}))
    with pytest.raises(UserError, match=r"model\.kwargs\.heads was 4, now it is null; give it as it was"):
        refuse_fixed(changes)


def test_a_resumed_run_keeps_the_loader_that_it_had_unless_another_is_given() -> None:
    resident, older = (config(data={"loader": "resident"}).model_dump(mode="json") for _ in range(2))
    del older["data"]["loader"]
    assert settled(config(), None).data.loader == "auto"
    for saved, loader in ((resident, "resident"), (older, "workers")):
        assert settled(config(), saved).data.loader == loader
        assert changed_keys(saved, config()) == {}
    [told] = describe_changes(changed_keys(older, config(data={"loader": "resident"})))
    assert told.startswith("Changed: data.loader was workers, now resident; the images are augmented by other random")


def test_a_resumed_run_keeps_the_decoder_that_it_had_unless_another_is_given() -> None:
    saved, older = (config(data={"decoder": "draft"}).model_dump(mode="json") for _ in range(2))
    del older["data"]["decoder"]
    assert settled(config(), config().model_dump(mode="json")).data.decoder == "auto"
    assert settled(config(), saved).data.decoder == "draft"
    assert settled(config(), older).data.decoder == "pillow", "runs that are older than the key"
    [told] = describe_changes(changed_keys(older, config(data={"decoder": "simplejpeg"})))
    assert told == "Changed: data.decoder was pillow, now simplejpeg; the images differ from here on"
