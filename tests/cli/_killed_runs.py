"""Runs commands of `pseudolabel` in processes that are killed; for tests, which talk to it in lines of JSON.

In: [arguments, seconds, which get SIGKILL unless they have ended before]. Out: the exit code, -9 if killed. A
process is forked from this one, which has torch imported, so that one run takes no longer than its work.
"""

import json
import os
import signal
import sys
import time

import torch

import pseudolabel.cli.generate  # noqa: F401 - so that it is imported once
from pseudolabel.cli import main

sync = os.fsync


def slow_sync(descriptor: int) -> None:
    """Of a disk so slow that many moments are in the middle of a write."""
    time.sleep(0.01)
    sync(descriptor)


def run(arguments: list[str], seconds: float) -> int:
    process = os.fork()
    if process == 0:
        code = 99
        os.fsync = slow_sync
        try:
            code = main(arguments)
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(process, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        time.sleep(0.001)


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads of torch do not live on in a forked process
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)
