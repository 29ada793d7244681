import gc
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from flagscale.data.prefetch import Ahead

CODE = """
import itertools, os, signal, sys, threading, time
from flagscale.data.prefetch import Ahead

def slow():
    for i in itertools.count():
        time.sleep(0.05)
        yield i

def stop(number, frame):
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
items = Ahead(slow, 2)
next(items)
if sys.argv[1] == "signal":
    if sys.argv[2] == "waiting":  # the consumer waits for an item, and none comes for a while
        items = Ahead(lambda: (time.sleep(1), iter([]))[1], 2)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    while True:
        next(items, None)
elif sys.argv[1] == "error":
    raise ValueError("main thread")
"""


def working() -> int:
    return sum(thread.name == "batches" for thread in threading.enumerate())


def until(condition: object, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.005)
    return condition()  # type: ignore[operator]


@pytest.mark.parametrize("depth", [1, 3])
def test_items_come_in_order_and_end(depth: int) -> None:
    ahead = Ahead(lambda: iter(range(20)), depth)
    assert list(ahead) == list(range(20))
    assert list(ahead) == []
    assert until(lambda: working() == 0)
    assert list(Ahead(lambda: iter([]), depth)) == []


def test_only_so_many_are_made_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for i in itertools.count():
            made.append(i)
            yield i

    ahead = Ahead(items, 3)
    assert not made  # nothing before it is asked for
    assert next(ahead) == 0
    assert until(lambda: len(made) == 4)
    time.sleep(0.05)
    assert len(made) == 4
    assert next(ahead) == 1
    ahead.close()
    assert working() == 0
    with pytest.raises(StopIteration):
        next(ahead)


def test_an_error_is_raised_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise OSError("the file is gone")

    ahead = Ahead(items, 8)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(OSError, match="the file is gone"):
        next(ahead)
    assert list(ahead) == []

    def refuse() -> Iterator[int]:
        raise ValueError("at once")

    with pytest.raises(ValueError, match="at once"):
        next(Ahead(refuse, 1))


def test_it_ends_when_dropped() -> None:
    ahead = Ahead(itertools.count, 2)
    next(ahead)
    assert working() == 1
    del ahead
    gc.collect()
    assert working() == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["exit"], 0), (["error"], 1), (["signal", "busy"], 0), (["signal", "waiting"], 0)],
)
def test_no_process_hangs_on_it(arguments: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code
    assert "Fatal" not in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)
