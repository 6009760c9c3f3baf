"""Starts programs by forking a process that has torch already, so that tests can afford hundreds of real starts.

Reads JSON requests from stdin, one a line, and answers each with a JSON line:
`{"start": PROGRAM, "arguments": [...], "env": {...}, "folder": F, "output": FILE, "errors": FILE}` → `{"pid": N}`;
`{"wait": PID}` → `{"status": null}` while it runs, then its exit status (negative: the signal that ended it).
Both with `"fresh"`: whether the program finds acmix not loaded yet (true) or loaded (false, a little quicker).
A program runs in its own process group. Its exit joins threads and calls exit handlers as Python's does, then skips the
teardown of modules, which takes seconds with torch loaded.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any, TextIO

PACKAGES = ("torch", "timm", "torchvision", "sklearn.datasets", "sklearn.model_selection", "torch.utils.tensorboard",
            "pydantic", "safetensors.torch", "matplotlib.backends.backend_agg")  # fmt: skip
OURS = (
    "acmix.config",
    "acmix.models",
    "acmix.data.arrays",
    "acmix.data.loader",
    "acmix.engine.trainer",
    "acmix.checkpoint.store",
)


def become(request: dict[str, Any]) -> None:
    """Turn this forked process into the program asked for, up to running it."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests in the background
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):  # ignored under nohup, and after a run in pytest
        signal.signal(number, signal.SIG_DFL)
    for name, flags, descriptor in (
        (os.devnull, os.O_RDONLY, 0),
        (request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 1),
        (request["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 2),
    ):
        opened = os.open(name, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    sys.argv = [request["start"], *request["arguments"]]
    sys.path[0] = os.path.dirname(os.path.abspath(request["start"]))


def run(program: str) -> int:
    """Run a program to its end; returns its exit status."""
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end_of_program:
        code = end_of_program.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
        return code if isinstance(code, int) else int(code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does with an exception that a program does not catch
        traceback.print_exc()
        return 1
    return 0


def end(status: int) -> None:
    """End this process as the interpreter would, without tearing modules down."""
    threading._shutdown()  # tells the threads of executors to end, then joins all
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(status)


def answer(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def serve(loaded: tuple[TextIO, TextIO] | None) -> str | None:
    """Answer requests until stdin ends (None); returns the program to run in a forked child.

    Those that are not fresh go to the process that has acmix `loaded`; None in that process.
    """
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if loaded and not request["fresh"]:
            print(line, end="", file=loaded[0], flush=True)
            print(loaded[1].readline(), end="", flush=True)
            continue
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer({"status": os.waitstatus_to_exitcode(status) if pid else None})
            continue
        pid = os.fork()
        if pid == 0:
            become(request)
            return str(request["start"])
        answer({"pid": pid})
    return None


def fork_loaded() -> tuple[TextIO, TextIO] | None:
    """Fork the process that loads acmix: its requests and answers; None in that process, where they are the streams."""
    requests, answers = os.pipe(), os.pipe()
    if os.fork():
        os.close(requests[0])
        os.close(answers[1])
        return os.fdopen(requests[1], "w"), os.fdopen(answers[0])
    os.dup2(requests[0], 0)
    os.dup2(answers[1], 1)
    for descriptor in (*requests, *answers):
        os.close(descriptor)
    load(OURS)
    sys.modules["acmix.data.arrays"].read_digits()  # which most programs train on
    return None


def load(modules: tuple[str, ...]) -> None:
    for module in modules:
        importlib.import_module(module)
    gc.freeze()


if __name__ == "__main__":
    load(PACKAGES)
    loaded = fork_loaded()
    if loaded:
        print(loaded[1].readline(), end="", flush=True)  # it is ready
    else:
        answer({"ready": True})
    program = serve(loaded)
    if program is not None:
        end(run(program))
    if loaded:
        loaded[0].close()
    with suppress(ChildProcessError):
        while True:
            os.wait()
    os._exit(0)
