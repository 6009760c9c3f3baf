"""The config of a run: its schema, how a file is read and overridden, what is said of one that does not fit.

Light on purpose (no torch), so that a mistake is reported at once. `python -m acmix.config FILE [KEY.PATH=VALUE ...]`
checks a file and prints it resolved; `python -m acmix.config --schema` prints the JSON schema for editors.
"""

from acmix.errors import needs_train_extra

with needs_train_extra():
    from acmix.config.load import load_config
    from acmix.config.schema import (
        AugmentConfig,
        Config,
        DataConfig,
        EmaConfig,
        LossConfig,
        ModelConfig,
        OptimizerConfig,
        PrecisionConfig,
        RunConfig,
        ScheduleConfig,
        dataset_kind,
        json_schema,
    )

__all__ = [
    "AugmentConfig", "Config", "DataConfig", "EmaConfig", "LossConfig", "ModelConfig", "OptimizerConfig",
    "PrecisionConfig", "RunConfig", "ScheduleConfig", "dataset_kind", "json_schema", "load_config",
]  # fmt: skip
