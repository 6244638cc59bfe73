"""What SIGINT and SIGTERM do to a script: one line and the end, or the end at a place that the job chooses."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

# Senders repeat a SIGTERM within this time (Paddle's launcher: three times); a later one is meant anew.
_REPEATED_S = 2.0

_promise: Callable[[], str] | None = None
# What is said when a signal is put off; None where none is.
_put_off: str | None = None
# The signal that was put off, and when it came.
_signal: int | None = None
_came = 0.0


class Interrupted(KeyboardInterrupt):
    """The end of an interrupted job; its text says what the next run starts from.

    Args:
        number: of the signal.
    """

    def __init__(self, text: str, number: int = signal.SIGINT):
        super().__init__(text)
        self.number = number


def line(promise: str | None = None) -> str:
    """What an interrupted script says."""
    if promise is None:
        promise = _promise() if _promise is not None else "the same command goes on where this run stopped"
    return f"{os.path.basename(sys.argv[0])}: interrupted; {promise}"


def asked() -> bool:
    """Whether a signal was put off in the last ``put_off`` block."""
    return _signal is not None


@contextlib.contextmanager
def promising(promise: Callable[[], str]) -> Iterator[None]:
    """In this block an interruption says ``promise``, asked for when it comes.

    Raises:
        Interrupted: in place of KeyboardInterrupt.
    """
    global _promise
    before, _promise = _promise, promise
    try:
        yield
    except (KeyboardInterrupt, ValueError, OSError) as error:
        if not isinstance(error, KeyboardInterrupt) and "KeyboardInterrupt" not in str(error):  # met inside Paddle
            raise
        raise Interrupted(promise(), getattr(error, "number", signal.SIGINT)) from None
    finally:
        _promise = before


@contextlib.contextmanager
def put_off(until: str) -> Iterator[None]:
    """In this block a first signal only makes ``asked`` true, and the job ends itself by ``stop``. A second SIGINT, or
    a SIGTERM after some seconds, ends it at once.

    Args:
        until: when the job ends, for people.

    Raises:
        Interrupted: the block has ended by itself after a signal.
    """
    global _put_off, _signal
    before = signal.getsignal(signal.SIGINT)
    takes_over = threading.current_thread() is threading.main_thread() and callable(before)
    if takes_over:
        signal.signal(signal.SIGINT, _on_interrupt)
    _put_off, _signal = until, None
    try:
        yield
        if asked():
            stop()
    finally:
        _put_off = None  # what was asked stays known: the signal may be repeated
        if takes_over:
            signal.signal(signal.SIGINT, before)


def stop() -> None:
    """End the job, here.

    Raises:
        Interrupted: always.
    """
    raise Interrupted("", _signal or signal.SIGTERM)


def _on_interrupt(number, frame) -> None:
    if asked():
        raise KeyboardInterrupt
    _put_it_off(number)


def _put_it_off(number: int) -> None:
    global _signal, _came
    _signal, _came = number, time.monotonic()
    if os.environ.get("PADDLE_TRAINER_ID", "0") == "0":
        again = "; interrupt once more to end at once" if number == signal.SIGINT else ""
        _write(f"interrupted: {_put_off}{again}")


def settle(speaks: Callable[[], bool]) -> bool:
    """SIGTERM, from a scheduler say, gets the line that SIGINT gets; False if somebody else handles it.

    A thread waits for it, which no long call of a library keeps from answering, and which Paddle's own handler cannot
    forestall: that one prints a trace of C++.

    Args:
        speaks: whether this process says the line.
    """
    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return False
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # for all threads to come
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]))
    threading.Thread(target=_wait_for_termination, args=(speaks,), daemon=True).start()
    return True


def _wait_for_termination(speaks: Callable[[], bool]) -> None:
    while True:
        signal.sigwait([signal.SIGTERM])
        if _put_off and not asked():
            _put_it_off(signal.SIGTERM)
        elif not asked() or time.monotonic() - _came > _REPEATED_S:
            break
    if speaks():
        _write(line())
    os._exit(128 + signal.SIGTERM)


def _write(text: str) -> None:
    """Past what another thread is printing."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))
