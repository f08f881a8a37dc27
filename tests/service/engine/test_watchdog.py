"""A step that does not end is noticed, one that is only slow is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

from gptjet.service.engine.watchdog import Watchdog

PATIENCE_S = 20.0


class Hung:
    """Takes what the watchdog says."""

    def __init__(self) -> None:
        self.stacks: list[str] = []
        self.said = threading.Event()

    def __call__(self, stack: str) -> None:
        self.stacks.append(stack)
        self.said.set()


def test_a_step_that_does_not_end_is_told_once_with_its_stack() -> None:
    hung = Hung()
    watchdog = Watchdog(0.2, hung)
    watchdog.start()
    end = threading.Event()

    def a_step_that_hangs() -> None:
        watchdog.begin()
        end.wait(PATIENCE_S)

    thread = threading.Thread(target=a_step_that_hangs)
    thread.start()
    assert hung.said.wait(PATIENCE_S)
    end.set()
    thread.join()
    watchdog.stop()
    assert len(hung.stacks) == 1
    assert "a_step_that_hangs" in hung.stacks[0]


def test_steps_that_end_and_a_long_idleness_are_not_hung() -> None:
    hung = Hung()
    watchdog = Watchdog(0.4, hung)
    watchdog.start()
    for _ in range(30):  # a second and more in all, none of them long
        watchdog.begin()
        time.sleep(0.03)
        watchdog.end()
    time.sleep(0.8)
    watchdog.stop()
    assert hung.stacks == []


def test_stop_is_fine_before_start_and_twice() -> None:
    watchdog = Watchdog(1.0, Hung())
    watchdog.stop()
    watchdog.start()
    watchdog.stop()
    watchdog.stop()


STOPPED = """
import sys, time
from gptjet.service.engine.watchdog import Watchdog
watchdog = Watchdog(2.0, lambda stack: print("hung", flush=True))
watchdog.start()
watchdog.begin()
print("in a step", flush=True)
sys.stdin.readline()  # it ends when we say so
watchdog.end()
watchdog.stop()
print("ended", flush=True)
"""


def test_a_process_that_was_stopped_meanwhile_is_not_taken_for_hung() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "in a step\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(3.0)
        process.stdin.write("\n")  # it finds this when it goes on
        process.stdin.flush()
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdout.readline() == "ended\n"
    finally:
        process.kill()
        process.communicate()
