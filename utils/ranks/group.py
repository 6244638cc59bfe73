"""The process group: who we are, checks that rank 0 makes for all, and arrays that move in blocks.

Works on NumPy arrays and small objects. With one process every call is the identity and Paddle is not
imported.
"""

import contextlib
import fcntl
import functools
import logging
import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from ..process import runtime
from . import mapped, meeting, shared_memory

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Collectives move at most this many bytes at a time.
BLOCK_BYTES = 16 << 20
_TEXTS_A_BLOCK = 10_000
# How long a rank waits for rank 0 to open the group, which it does when it has read and checked: for ever, as the
# launcher ends all when one has ended.
_JOINING_S = 10 * 24 * 3600
# Where this process waits for the others before a collective of gloo's; see ``through_gloo``.
_wait: Callable[[], object] | None = None
# Linux: the ioctl that asks an interface for its IPv4 address.
_SIOCGIFADDR = 0x8915


class Ranks:
    """The workers of this run.

    ``start`` joins them; every method is a collective that all ranks must call in the same order.
    """

    def __init__(self) -> None:
        self.rank = runtime.rank()
        self.size = runtime.world_size()
        self._joined = self.size == 1
        self._shared: shared_memory.SharedMemory | None = None

    @property
    def is_first(self) -> bool:
        """True on the rank that reads, checks, prints and writes."""
        return self.rank == 0

    def start(self, check: Callable[[], Result]) -> Result | None:
        """Run ``check`` on rank 0, join the group, and return its result on rank 0 (None elsewhere).

        If the check fails, every rank raises: rank 0 the error itself, at once and without the group when all ranks
        are on this machine (the launcher then ends the others), and after telling the others when they are not.
        """
        if runtime.local_world_size() < self.size:
            self._join()
            return self.on_first(check)
        result = check() if self.is_first else None
        self._join()
        return result

    def on_first(self, work: Callable[[], Result]) -> Result | None:
        """Run ``work`` on rank 0; an error there is raised on every rank."""
        result, failure = None, None
        if self.is_first:
            try:
                result = work()
            except (ValueError, OSError) as error:
                failure = error
        self._raise_together(failure)
        return result

    def all_agree(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` on every rank; if it fails on any, the lowest such rank's error is raised on all."""
        result, failure = None, None
        try:
            result = work()
        except (ValueError, OSError) as error:
            failure = error
        for rank, error in enumerate(self.gather_object(failure)):
            if error is not None:
                error.told_elsewhere = self._is_told_by_others(rank)
                raise error
        return result  # type: ignore[return-value]

    def _raise_together(self, failure: Exception | None) -> None:
        failure = self.broadcast_object(failure)
        if failure is not None:
            failure.told_elsewhere = self._is_told_by_others(0)
            raise failure

    def _is_told_by_others(self, failed: int) -> bool:
        """Whether this rank need not say what went wrong on another: that one does, and one on each other machine."""
        own = runtime.rank_on_machine()
        first = self.rank - own  # the launcher numbers a machine's ranks in turn
        return failed != self.rank and (own != 0 or first <= failed < first + runtime.local_world_size())

    def _join(self) -> None:
        if not self._joined:
            paddle = runtime.import_paddle()
            if runtime.local_world_size() < self.size:
                _name_the_network_interface()
            else:
                os.environ.setdefault("FLAGS_stop_check_timeout", str(_JOINING_S))
            with _quiet_output(), through_gloo():
                paddle.distributed.init_parallel_env()
            self._joined = True
            self._settle_processor_features()
            self._share_memory()
            self._agree_where_to_wait()

    def _agree_where_to_wait(self) -> None:
        global _wait
        if self._shared is not None:
            _wait = functools.partial(self._shared.gather, np.zeros(1))
            return
        host = os.environ["PADDLE_TRAINER_ENDPOINTS"].partition(",")[0].rpartition(":")[0]
        door = meeting.invite(host) if self.is_first else None
        port, token = self.broadcast_object((door.getsockname()[1], secrets.token_bytes(32)) if door else None)
        if door is not None:
            _wait = meeting.receive(door, self.size, token).wait
        else:
            _wait = meeting.join(host, port, self.rank, token).wait

    def _share_memory(self) -> None:
        """Where all ranks are on this machine and can map the same memory, arrays will go through that."""
        if runtime.local_world_size() < self.size or not shared_memory.is_possible():
            return
        path, descriptor, shared = None, None, None
        if self.is_first:
            with contextlib.suppress(OSError):
                path, descriptor = shared_memory.create(self.size)
        path, pids = self.broadcast_object(path), self.gather_object(os.getpid())
        if path is not None:
            with contextlib.suppress(OSError):
                shared = shared_memory.SharedMemory(path, self.rank, pids)
        if all(self.gather_object(shared is not None)):
            self._shared = shared
        if descriptor is not None:
            os.close(descriptor)

    def _settle_processor_features(self) -> None:
        """Machines may differ, and bfloat16 on some of them would make vectors depend on who computed which."""
        own = runtime.cpu_flags()
        common = frozenset.intersection(*self.gather_object(own))
        runtime.keep_cpu_flags(common)
        if lost := sorted(own - common):
            logger.info(
                "rank %d does without features of its processor that others lack: %s", self.rank, " ".join(lost)
            )

    def broadcast_object(self, value):
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        if self._shared is not None:
            return self._shared.broadcast_object(value)
        import paddle.distributed as dist

        box = [value]
        with through_gloo():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_object(self, value) -> list:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        if self._shared is not None:
            return self._shared.gather_object(value)
        import paddle.distributed as dist

        box: list = []
        with through_gloo():
            dist.all_gather_object(box, value)
        return box

    def broadcast(self, array: np.ndarray | None, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Rank 0's array, on every rank. One block: the caller bounds its size.

        Args:
            shape: of an array that every rank knows to be float32 of this shape, which saves telling them.
        """
        if self.size == 1:
            assert array is not None
            return array
        import paddle
        import paddle.distributed as dist

        dtype = "<f4"
        if shape is None:
            shape, dtype = self.broadcast_object((array.shape, array.dtype.str) if array is not None else None)
        if array is None:
            array = np.empty(shape, dtype)
        if array.size == 0:
            return array
        if self._shared is not None:
            array = np.ascontiguousarray(array)
            self._shared.broadcast(array)
            return array
        tensor = paddle.to_tensor(np.ascontiguousarray(array))
        with through_gloo():
            dist.broadcast(tensor, src=0)
        return array if self.is_first else tensor.numpy()

    def mapped(self, array: np.ndarray | None) -> np.ndarray | None:
        """Rank 0's array, on every rank, where all can map it from the same file; else None on every rank."""
        if self.size == 1:
            return array
        if runtime.local_world_size() < self.size:
            return None
        place = self.broadcast_object(mapped.place_of(array) if array is not None else None)
        if place is None:
            return None
        own = array if self.is_first else mapped.map_place(place)
        return own if all(self.gather_object(own is not None)) else None

    def broadcast_texts(self, texts: Sequence[str] | None) -> Sequence[str]:
        """Rank 0's texts, on every rank, moved in bounded blocks."""
        if self.size == 1:
            assert texts is not None
            return texts
        received: list[str] = []
        for start in range(0, self.broadcast_object(len(texts) if texts is not None else None), _TEXTS_A_BLOCK):
            block = texts[start : start + _TEXTS_A_BLOCK] if texts is not None else None
            received += self.broadcast_object(block)
        return received

    def gather_rows(self, array: np.ndarray) -> list[np.ndarray]:
        """Every rank's array, in rank order, on every rank; they may differ in their first dimension.

        One block: the caller bounds its size. All ranks give the same dtype and trailing dimensions.
        """
        if self.size == 1:
            return [array]
        counts = self.gather_object(len(array))
        if max(counts) == 0:
            return [array] * self.size
        padded = np.zeros((max(counts), *array.shape[1:]), array.dtype)
        padded[: len(array)] = array
        return [part[:count] for part, count in zip(self.gather_equal(padded), counts, strict=True)]

    def gather_equal(self, array: np.ndarray) -> list[np.ndarray]:
        """``gather_rows`` of arrays that have the same shape on every rank: one collective, and not four."""
        if self.size == 1:
            return [array]
        if self._shared is not None:
            return self._shared.gather(array)
        import paddle
        import paddle.distributed as dist

        parts: list = []
        with through_gloo():
            dist.all_gather(parts, paddle.to_tensor(array))
        return [part.numpy() for part in parts]


@contextlib.contextmanager
def through_gloo() -> Iterator[None]:
    """Wait for the other ranks, and say in one line what gloo says with its source file when one has ended.

    gloo itself waits for 30 s at most; rank 0 may be writing for longer.
    """
    if _wait is not None:
        _wait()
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        raise ConnectionError("another process of this run has ended, or cannot be reached") from error


def _name_the_network_interface() -> None:
    """Tell gloo, which otherwise takes the host name's address (often a loopback), how the launcher reaches us."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    host = os.environ.get("PADDLE_CURRENT_ENDPOINT", "").rpartition(":")[0]
    for _, name in socket.if_nameindex():
        request = struct.pack("256s", name.encode()[:15])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)  # fails where there is no address
            if socket.inet_ntoa(answer[20:24]) == host:
                os.environ["GLOO_SOCKET_IFNAME"] = name


class _quiet_output:
    """Keep the native libraries' own lines (gloo's rendezvous) off stdout and stderr."""

    def __enter__(self) -> None:
        self.saved = [(fd, os.dup(fd)) for fd in (1, 2)]
        self.sink = os.open(os.devnull, os.O_WRONLY)
        for fd, _ in self.saved:
            os.dup2(self.sink, fd)

    def __exit__(self, *error) -> None:
        for fd, copy in self.saved:
            os.dup2(copy, fd)
            os.close(copy)
        os.close(self.sink)
