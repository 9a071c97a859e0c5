"""A hostile case that hangs or eats the memory fails by itself, and does not take the machine with it."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

SECONDS, BYTES = 60, 3 << 30


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    """Half-way through nothing: after so many seconds, or bytes more than before, the case is an error."""
    try:
        import resource
    except ImportError:  # no POSIX
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt(f"this case took more than {SECONDS} seconds")

    statm = Path("/proc/self/statm")
    before = resource.getrlimit(resource.RLIMIT_AS)
    alarm = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        resource.setrlimit(resource.RLIMIT_AS, before)
