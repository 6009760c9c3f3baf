"""What all arms of a study get the same of, and the epochs that each trains for it.

`epochs`: each arm trains as its config says.
`time`: each arm gets the time that the reference's training takes, by images per second measured in a short run of
    each (`PROBE_UPDATES` updates, evaluation not counted): epochs = reference's · its rate / reference's rate.
`multiply_adds`: each arm spends the multiply-adds of the reference's training: epochs = reference's · reference's
    multiply-adds for an image / its own.
`parameters`: each arm trains as its config says, and one whose network is more than `TOLERANCE` larger or smaller than
    the reference's is refused.

Epochs are rounded to a whole number, at least 1, and the warm-up keeps its share of them.
"""

from collections.abc import Mapping

from acmix.config import Config
from acmix.errors import UserError
from acmix.studies.schema import Study

PROBE_UPDATES = 40
TOLERANCE = 0.03
_SCALED = ("schedule.epochs", "schedule.warmup_epochs", "schedule.steps")

Added = dict[str, dict[str, object]]
"""Arm → keys that it gets besides those of the study."""


def probe_keys() -> dict[str, object]:
    """What makes a run of an arm a measurement of its rate."""
    return {"schedule.steps": PROBE_UPDATES, "run.log_every": PROBE_UPDATES // 8, "run.keep": 1}


def check_budget(study: Study, configs: Mapping[str, Config]) -> None:
    """UserError where the study or its base set what an equal budget has to set."""
    if study.equal not in ("time", "multiply_adds"):
        return
    for arm, overrides in study.arms.items():
        keys = [override.partition("=")[0] for override in overrides]
        if found := next((key for key in keys if key in (*_SCALED, "schedule")), None):
            raise UserError(
                f"equal: {study.equal} sets the epochs of arm {arm}, which sets {found}; leave out one of them"
            )
    if configs[study.reference].schedule.steps is not None:
        raise UserError(f"equal: {study.equal} is a number of epochs, which schedule.steps cuts short; leave steps out")


def equal_parameters(study: Study, parameters: Mapping[str, int]) -> None:
    """UserError for arms whose number of parameters is not that of the reference, within `TOLERANCE`."""
    wanted = parameters[study.reference]
    odd = {arm: count for arm, count in parameters.items() if abs(count - wanted) > TOLERANCE * wanted}
    if odd:
        told = ", ".join(f"{arm} has {count:,} ({count / wanted - 1:+.1%})" for arm, count in odd.items())
        raise UserError(
            f"equal: parameters: {study.reference} has {wanted:,} parameters, {told}; more than {TOLERANCE:.0%} apart. "
            "Set a width in those arms, such as model.kwargs.base_width or model.kwargs.embed_dim"
        )


def scaled_epochs(study: Study, config: Config, rates: Mapping[str, float]) -> Added:
    """The schedule of each arm when all get the same budget.

    config: of the reference; rates: arm → images that one unit of the budget pays for.
    """
    schedule, added = config.schedule, Added()
    for arm in study.arms:
        epochs = max(1, round(schedule.epochs * rates[arm] / rates[study.reference]))
        warmup = schedule.warmup_epochs * epochs / schedule.epochs
        added[arm] = {} if epochs == schedule.epochs else {"schedule.epochs": epochs, "schedule.warmup_epochs": warmup}
    return added
