"""Starts programs by forking a process that has torch already, so that a drill can afford hundreds of real starts.

Reads JSON requests from stdin, one a line, and answers each with a JSON line:
`{"start": PROGRAM, "arguments": [...], "env": {...}, "folder": F, "output": FILE, "errors": FILE}` → `{"pid": N}`;
`{"wait": PID}` → `{"status": null}` while it runs, then its exit status (negative: the signal that ended it).
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
from typing import Any

PRELOAD = ("torch", "timm", "torchvision", "sklearn.datasets", "torch.utils.tensorboard", "acmix.config",
           "acmix.models", "acmix.data.loader", "acmix.engine.trainer", "acmix.checkpoint.store")  # fmt: skip


def become(request: dict[str, Any]) -> None:
    """Turn this forked process into the program asked for, up to running it."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests in the background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
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
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def answer(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def serve() -> str | None:
    """Answer requests until stdin ends (None); returns the program to run in a forked child."""
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
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


if __name__ == "__main__":
    for module in PRELOAD:
        importlib.import_module(module)
    gc.freeze()
    answer({"ready": True})
    program = serve()
    if program is None:
        os._exit(0)
    else:
        end(run(program))
