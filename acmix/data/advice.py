"""What to change where training waits for its data."""

from acmix.config import Config
from acmix.cores import cores_per_process
from acmix.data.resident import Kind
from acmix.data.workers import worker_count

_TOLERATED = 0.1


def advice_on_waiting(share: float, epoch: int, config: Config, loader: Kind) -> list[str]:
    """A line for an epoch that waited for more than a tenth of its time; none for any other.

    share: of the epoch's time, 0 to 1; epoch: counted from 1; loader: the training loader.
    """
    if share <= _TOLERATED:
        return []
    workers, cores = worker_count(config), cores_per_process()
    if loader == "resident":
        way_out = "its process also augments the images; data.loader=workers gives that to others"
    elif workers < cores - 1:
        way_out = f"raise data.num_workers ({workers} now; this process may use {cores} cores)"
    else:
        way_out = (
            f"{workers} loader processes are all that {cores} cores can serve; store the images smaller, augment them "
            "less, or hold them in memory if they fit (data.loader=resident)"
        )
    return [f"Epoch {epoch} waited for data {share:.0%} of its time: {way_out}"]
