"""What must be settled before Paddle is imported, and how a script ends.

Paddle's CPU wheel needs help to be fast: on AMD its maths library picks a slow path, and its allocator
returns every large temporary to the kernel. Both are settled here, by environment variables and one
libc call, so this module must run first and imports only the standard library (and how a script is interrupted).
"""

import contextlib
import ctypes
import functools
import gc
import io
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from . import interruption

# What requirements.lock installs and the scripts import.
_INSTALLED = ("paddle", "paddlenlp", "numpy", "numba", "llvmlite", "faiss", "tokenizers", "tqdm", "jieba", "bm25s")

# C0 without tab and line feed, DEL, C1, what has no width, and the marks and overrides of writing direction.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]")

# The launcher shows the log of a worker that has failed: those that say nothing leave after the one that has spoken.
_LET_SPEAK_S = 3

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_PR_SET_PDEATHSIG = 1

_flags: frozenset[str] | None = None
# The process that ``prepare`` has set up: its threads, and those of the libraries that it uses, do not survive a fork.
_prepared_in: int | None = None
# What is called when a script's work is done.
_last: list[Callable[[], None]] = []


def prepare(trains: bool = False) -> None:
    """Set the process up for Paddle. Call before the first ``import paddle``; safe to call again.

    Args:
        trains: the process will train, where our own loops take turns with Paddle's products on the same cores.

    Raises:
        ValueError: the launcher's variables in the environment contradict each other, or this process is a fork of one
            that was set up.
    """
    global _prepared_in
    if _prepared_in not in (None, os.getpid()):
        raise ValueError(
            "this process is a fork of one that has run a job, and lacks its threads; start it afresh, as"
            ' multiprocessing.get_context("spawn") does'
        )
    _prepared_in = os.getpid()
    _check_launcher()
    threads = str(cpu_threads())
    # Every worker runs its arithmetic on its share of the cores: more threads than cores crawl.
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    # Our own threads call NumPy and SciPy, each with single-threaded products; see threads.in_threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if int(threads) > 1 else "false")
    if "AuthenticAMD" in _cpu_info() and "avx2" in _cpu_info():
        # MKL 2019 takes its AVX2 kernels on AMD only when told to: 39 GFLOP/s a core becomes 105.
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ.setdefault("FLAGS_call_stack_level", "0")
    if trains:
        # Paddle's threads would go on spinning for 0.2 s after each product. (Where short texts are encoded by Paddle,
        # that is just as well: waking them up takes longer.)
        os.environ.setdefault("KMP_BLOCKTIME", "0")
    _keep_large_blocks()
    if is_launched():
        _die_with_parent()


def import_paddle():
    """Import Paddle without the lines that it prints while it is being imported, and return it."""
    if "paddle" not in sys.modules:
        gc.disable()
        with contextlib.ExitStack() as quiet:
            quiet.callback(gc.enable)
            quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
            quiet.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            import paddle  # noqa: F401
        # Its hundreds of thousands of objects stay: looking for garbage among them takes 70 ms each time.
        gc.freeze()
    return sys.modules["paddle"]


def is_launched() -> bool:
    """True in a worker of ``python -m paddle.distributed.launch`` with more than one process."""
    return world_size() > 1


def rank() -> int:
    """This worker's number among all workers of all nodes."""
    return _from_launcher("PADDLE_TRAINER_ID", 0)


def world_size() -> int:
    """The number of workers on all nodes."""
    return _from_launcher("PADDLE_TRAINERS_NUM", 1)


def local_world_size() -> int:
    """The number of workers on this node."""
    return _from_launcher("PADDLE_LOCAL_SIZE", 0) or world_size()


def rank_on_machine() -> int:
    """This worker's number among those of its node."""
    return _from_launcher("PADDLE_RANK_IN_NODE", rank() % local_world_size())


def _from_launcher(name: str, default: int) -> int:
    """A whole number that the launcher has put into the environment."""
    text = os.environ.get(name, "").strip() or str(default)
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise ValueError(
            f"{name} is {text!r} in the environment; expected a whole number, as Paddle's launcher sets it"
        )
    return int(text)


def _check_launcher() -> None:
    """A shell may hold what is left of the launcher's variables, such as only the rank."""
    if rank() >= world_size() or local_world_size() > world_size():
        raise ValueError(
            f"the environment says rank {rank()} (PADDLE_TRAINER_ID) of {world_size()} (PADDLE_TRAINERS_NUM),"
            f" {local_world_size()} of them here (PADDLE_LOCAL_SIZE); unset what is left over from another launch"
        )
    if world_size() > 1 and not os.environ.get("PADDLE_TRAINER_ENDPOINTS"):
        raise ValueError(
            f"PADDLE_TRAINERS_NUM is {world_size()} in the environment, but PADDLE_TRAINER_ENDPOINTS is not set; start"
            " with python -m paddle.distributed.launch, or unset what is left over from another launch"
        )


def cpu_threads() -> int:
    """This worker's share of the processors that it may run on, or of what a container's limit leaves of them."""
    processors = min(len(os.sched_getaffinity(0)), _cpu_limit() or sys.maxsize)
    return max(1, processors // local_world_size())


@functools.cache
def _cpu_limit(root: str = "/sys/fs/cgroup") -> int | None:
    """A container's limit on processor time in whole processors, rounded up; None where there is none.

    More threads than that would take turns, and wait for the next period while they hold what others need.

    Args:
        root: where control groups are mounted, of version 2 or 1; a container sees its own there.
    """
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = (int(word) for file in files for word in (Path(root) / file).read_text().split())
        except (OSError, ValueError):  # not there, or "max"
            continue
        if quota > 0 and period > 0:
            return -(-quota // period)
    return None


def cache_root() -> Path:
    """The toolkit's folder in the user's cache (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "paddle-embedding-toolkit"


def cpu_has(*flags: str) -> bool:
    """True if the processor has every one of these features, and all other ranks' have them too, once they have met."""
    return cpu_flags().issuperset(flags)


def cpu_flags() -> frozenset[str]:
    """The processor's features that count, by their names in /proc/cpuinfo."""
    global _flags
    if _flags is None:
        lines = (line.partition(":") for line in _cpu_info().splitlines())
        _flags = frozenset(
            word for name, _, words in lines if name.strip() in ("flags", "Features") for word in words.split()
        )
    return _flags


def keep_cpu_flags(common: frozenset[str]) -> None:
    """From now on only these features count: what is computed must not depend on which rank computes it."""
    global _flags
    _flags = common


def _cpu_info() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    return text.partition("\n\n")[0]


def _keep_large_blocks() -> None:
    """Let malloc keep large blocks instead of page-faulting them in again at each use (glibc only)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def give_back_memory() -> None:
    """Hand the blocks that malloc has kept back to the system, after work that needed many (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _die_with_parent() -> None:
    """A worker whose launcher was killed must not go on writing beside the next run's workers."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    # Asked after that, so that a launcher that dies now is either missing already or sends its signal.
    if "PADDLE_RANK_IN_NODE" in os.environ and not _launcher_lives():
        os._exit(1)


def _launcher_lives() -> bool:
    """False if none of the processes above this one can be Paddle's launcher, a Python program with Paddle loaded.

    Our parent's number says too little: in a container a launcher may have number 1, and orphans may be taken in by
    another process than that.
    """
    pid, below = os.getppid(), 0
    while pid > 0:
        try:
            if "libpaddle" in Path(f"/proc/{pid}/maps").read_text(errors="replace"):
                return True
            status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        except OSError:  # another user's
            return pid != 1
        pid, below = int(status.partition("\nPPid:")[2].split()[0]), pid
    return below != 1  # what has started the process below is out of sight


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def at_end(tell: Callable[[], None]) -> None:
    """Call this when the script's work is done."""
    _last.append(tell)


def run(main: Callable[[], None]) -> None:
    """Run a script's ``main`` and end the process.

    A user's mistake (ValueError, OSError) becomes one line on stderr and exit status 2, on the rank where
    it was met only; anything else is a defect of ours and keeps its traceback.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that knows no Chinese must not end a run
    try:
        interruption.settle(_speaks)
        main()
        for tell_of_it in _last:
            tell_of_it()
    except (ValueError, OSError) as error:
        if isinstance(error, ConnectionError) and interruption.asked():
            _leave(128 + signal.SIGTERM)  # the worker that is missing has spoken
        if "KeyboardInterrupt" in str(error):  # met inside Paddle
            _interrupted()
        if not getattr(error, "told_elsewhere", False):
            _say(f"error: {error}")
        else:
            time.sleep(_LET_SPEAK_S)
        _leave(2)
    except MemoryError as error:
        _say(f"error: out of memory: {error}")
        _leave(2)
    except KeyboardInterrupt as error:
        _interrupted(error)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _INSTALLED:
            raise
        place = f"for {sys.executable}; run `make setup`, then `. .venv/bin/activate`"
        _say(f"error: {error.name} is not installed {place}")
        _leave(2)
    _leave(0)


def _say(message: str) -> None:
    """One line on stderr."""
    line = shown(" ".join(f"{os.path.basename(sys.argv[0])}: {message}".split()))
    print(line, file=sys.stderr, flush=True)


def shown(text: str) -> str:
    """A text for a terminal: control characters and marks that turn the direction of writing become escapes.

    Data may hold sequences that clear a screen, rename a window or reorder what is read. Line ends and tabs stay.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def tell(summary: str) -> None:
    """Print what a finished job has to say. That nobody reads it does not make the job fail."""
    try:
        print(shown(summary), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the stream
        if not isinstance(error, BrokenPipeError):  # such as ``| head -1``
            print(f"cannot print the summary ({error.strerror}); the outputs are complete", file=sys.stderr)


def _open_closed_streams() -> None:
    """Where a scheduler has closed them, a file that is opened later would become standard output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _interrupted(error: BaseException | None = None) -> NoReturn:
    if rank() == 0:
        promise = str(error) if isinstance(error, interruption.Interrupted) else None
        print(shown(interruption.line(promise)), file=sys.stderr, flush=True)
    _leave(128 + getattr(error, "number", signal.SIGINT))


def _speaks() -> bool:
    """Whether this process tells of a SIGTERM: alone, or first of workers that all live.

    The launcher ends its workers by SIGTERM also when one of them has failed, and that one has spoken.
    """
    if not is_launched():
        return True
    launcher = os.getppid()
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        states = [Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] for child in children]
    except OSError:  # one has just ended
        return False
    return rank() == 0 and sum(state != "Z" for state in states) >= local_world_size()


def _leave(status: int) -> NoReturn:
    """End a worker without the interpreter's tear-down, in which gloo's threads may crash or hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "paddle" in sys.modules:
        os._exit(status)
    sys.exit(status)
