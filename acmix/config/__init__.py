"""The config of a run: its schema, the table of datasets, how a file is read and overridden, error messages.

Light on purpose (no torch), so that a mistake is reported at once. `python -m acmix.config FILE [KEY.PATH=VALUE ...]`
checks a file and prints it resolved; `python -m acmix.config --schema` prints the JSON schema for editors.
"""

from acmix.errors import needs_train_extra

with needs_train_extra():
    from acmix.config.datasets import Dataset, find_dataset, register_dataset
    from acmix.config.load import as_override, data_config, load_config
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
        json_schema,
    )

__all__ = [
    "AugmentConfig", "Config", "DataConfig", "Dataset", "EmaConfig", "LossConfig", "ModelConfig", "OptimizerConfig",
    "PrecisionConfig", "RunConfig", "ScheduleConfig", "as_override", "data_config", "find_dataset", "json_schema",
    "load_config", "register_dataset",
]  # fmt: skip
