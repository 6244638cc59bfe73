"""A place where the ranks of several machines wait for each other, for as long as it takes.

gloo gives up after 30 s, whatever the others are doing. So the ranks meet here before each of its collectives: in
sockets, whose ends the kernel watches. A rank that works, or is stopped, is waited for; one that has ended closes its
socket; and a machine that is gone leaves the kernel's probes unanswered for ``_GONE_S`` seconds.
"""

import hmac
import selectors
import socket
import struct

# The kernel asks an idle machine so often, and takes it for gone after so long.
_PROBE_S, _GONE_S = 5, 30
_HELLO = struct.Struct("<i32s")
# What a rank says when it has come, and rank 0 when all have.
_HERE = b"."


class Meeting:
    """One rank's way to the others: rank 0's to each of them, theirs to rank 0.

    Args:
        others: connected sockets.
        leads: True on rank 0, which lets the others go on.
    """

    def __init__(self, others: list[socket.socket], leads: bool):
        self._others, self._leads = others, leads
        for other in others:
            _watch(other)

    def wait(self) -> None:
        """Return when every rank has called this as often as this one.

        Raises:
            ConnectionError: a rank has ended, or its machine is gone.
        """
        try:
            if not self._leads:
                self._others[0].sendall(_HERE)
            self._hear()
            if self._leads:
                for other in self._others:
                    other.sendall(_HERE)
        except OSError as error:
            raise ConnectionError("another process of this run has ended, or cannot be reached") from error

    def _hear(self) -> None:
        """A word from each of the others."""
        with selectors.DefaultSelector() as waited:
            for other in self._others:
                waited.register(other, selectors.EVENT_READ)
            while waited.get_map():
                for key, _ in waited.select():
                    if not key.fileobj.recv(1):
                        raise ConnectionError
                    waited.unregister(key.fileobj)


def invite(host: str) -> socket.socket:
    """Rank 0's door; the others need its port."""
    return socket.create_server((host, 0), backlog=1024)


def receive(door: socket.socket, size: int, token: bytes) -> Meeting:
    """Rank 0's meeting, once all ``size - 1`` others have knocked. Whoever does not know the token is sent away.

    Raises:
        ConnectionError: they have not come.
    """
    guests: dict[int, socket.socket] = {}
    door.settimeout(_GONE_S)
    with door:
        while len(guests) < size - 1:
            try:
                guest, _ = door.accept()
                guest.settimeout(_GONE_S)
                rank, told = _HELLO.unpack(_exactly(guest, _HELLO.size))
            except TimeoutError:
                raise ConnectionError("another process of this run has ended, or cannot be reached") from None
            except OSError:
                continue
            if hmac.compare_digest(told, token) and 0 < rank < size and rank not in guests:
                guests[rank] = guest
            else:
                guest.close()
    return Meeting([guests[rank] for rank in sorted(guests)], leads=True)


def join(host: str, port: int, rank: int, token: bytes) -> Meeting:
    """Another rank's meeting.

    Raises:
        ConnectionError: rank 0 cannot be reached.
    """
    try:
        way = socket.create_connection((host, port), timeout=_GONE_S)
        way.sendall(_HELLO.pack(rank, token))
    except OSError as error:
        raise ConnectionError("another process of this run has ended, or cannot be reached") from error
    return Meeting([way], leads=False)


def _exactly(guest: socket.socket, size: int) -> bytes:
    told = b""
    while len(told) < size:
        part = guest.recv(size - len(told))
        if not part:
            raise ConnectionError
        told += part
    return told


def _watch(way: socket.socket) -> None:
    """Let the kernel notice that the other end's machine is gone, also where something was sent to it."""
    way.settimeout(None)
    way.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    way.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    way.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_S)
    way.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
    way.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _GONE_S // _PROBE_S - 1)
    way.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _GONE_S)
