"""What torch.compile made is found again at the next start of a run."""

from pathlib import Path

import pytest

from acmix.engine.run_folder import COMPILED
from acmix.ops.native import cxx_compiler

TINY = (
    "--config", "configs/quickstart.yaml", "data.batch_size=16", "model.kwargs.base_width=8", "run.threads=1",
    "precision.compile=true", "run.log_every=1",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(cxx_compiler() is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("where", [None, "elsewhere"])
def test_a_resumed_run_compiles_nothing_again(where: str | None, launcher, tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / (where or f"run/{COMPILED}")
    choice = () if where is None else (f"precision.compile_cache={cache}",)
    unset = {"TORCHINDUCTOR_CACHE_DIR": "", "TRITON_CACHE_DIR": ""}  # the tests set their own
    made = []
    for steps in (2, 3):
        options = (*TINY, *choice, f"run.dir={run}", f"schedule.steps={steps}", "--resume", "auto")
        assert launcher.start("train.py", *options, env=unset, fresh=True).wait(600) == 0
        made.append({file.name for file in cache.rglob("*.so")})
    assert made[0]
    assert made[1] == made[0]
