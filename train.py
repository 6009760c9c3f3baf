"""Train a model from one YAML file.

python train.py --config configs/quickstart.yaml [--resume none|auto|PATH] [--dry-run] [KEY.PATH=VALUE ...]
torchrun --nproc-per-node N train.py --config ...

Exit status: 0 the work is done; 2 bad usage, config or data; 75 stopped by a signal after saving, start it again with
--resume auto; 1 anything else.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from acmix.process.program import Arguments, rank_from_environment, run_program
from acmix.process.signals import StopSignals

if TYPE_CHECKING:
    from torch import nn

    from acmix.config import Config
    from acmix.engine.run_folder import RunChoice


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    signals = StopSignals()
    return run_program(lambda: prepare(arguments, signals), signals)


def prepare(arguments: Sequence[str] | None, signals: StopSignals) -> int:
    """Everything that can be refused before the slow imports: usage, missing packages, config, run folder."""
    parser = Arguments(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run")
    parser.add_argument("--resume", default="none", metavar="none|auto|PATH", help="what to continue from (none)")
    parser.add_argument("--dry-run", action="store_true", help="run one step, print the plan, leave nothing behind")
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="config values to override")
    options = parser.parse_intermixed_args(arguments)
    from acmix.config import load_config
    from acmix.engine.run_folder import RunChoice, choose_run

    config = load_config(options.config, options.overrides)
    choice = RunChoice() if options.dry_run else choose_run(config, options.resume)
    if choice.status is not None:
        if rank_from_environment() == 0:
            print(choice.message)
        return choice.status
    return train(config, choice, signals, dry_run=options.dry_run)


def train(config: "Config", choice: "RunChoice", signals: StopSignals, *, dry_run: bool) -> int:
    """Build the parts of a run and let the trainer run it; returns the exit status."""
    from acmix import models
    from acmix.checkpoint.weights import start_from
    from acmix.data.loader import build_data, resolve_num_classes
    from acmix.data.transforms import build_mixup
    from acmix.engine.dry_run import plan
    from acmix.engine.learner import Learner
    from acmix.engine.proof import memory_explained, prove
    from acmix.engine.run_folder import classes_to_keep
    from acmix.engine.session import Session
    from acmix.engine.trainer import Trainer
    from acmix.process.distributed import Distributed
    from acmix.process.environment import set_up_torch

    def build_model() -> "nn.Module":
        start, width = None if snapshot else config.model.checkpoint, resolve_num_classes(config, data)
        kwargs = config.model.kwargs | ({"pretrained": False} if snapshot or start else {})  # their weights replace it
        model = models.create_model(config.model.name, width, image_size=config.data.size, **kwargs)
        prove(model, config, width, dist, training=True)
        if start:
            start_from(model, start, models.load_official)
        return model

    with Distributed.start(config.run) as dist, Session(choice, config, dist) as session, memory_explained(config):
        if not dry_run:
            signals.begin()
        set_up_torch(config.run, dist.device)
        snapshot = session.load()
        classes, ranks = classes_to_keep(config, snapshot), {"rank": dist.rank, "world_size": dist.world_size}
        data = dist.all_or_none(lambda: build_data(session.config, **ranks, classes=classes))
        config = session.settle(data.loader)
        model = dist.all_or_none(build_model)
        mixing = build_mixup(config, data.num_classes)
        learner = dist.all_or_none(lambda: Learner(config, model, dist, data.train, mixing=mixing, new=session.new))
        trainer = dist.all_or_none(lambda: Trainer(config, learner, data, session, signals))
        if dry_run:
            lines = plan(config, learner, data)
            if dist.is_main:
                print("\n".join(lines))
            return 0
        if snapshot is not None:
            dist.all_or_none(lambda: trainer.resume(snapshot))
        session.open(data.classes, trainer.progress.step)
        return trainer.fit()


if __name__ == "__main__":
    sys.exit(main())
