"""Ranks of several machines that wait for each other."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from conftest import ROOT, script_env

from utils.ranks import meeting

TOKEN = secrets.token_bytes(32)


def met(size: int) -> list[meeting.Meeting]:
    """All ranks' meetings, in this process."""
    door = meeting.invite("127.0.0.1")
    port = door.getsockname()[1]
    others = []
    threads = [
        threading.Thread(target=lambda rank=rank: others.append(meeting.join("127.0.0.1", port, rank, TOKEN)))
        for rank in range(1, size)
    ]
    for thread in threads:
        thread.start()
    first = meeting.receive(door, size, TOKEN)
    for thread in threads:
        thread.join()
    return [first, *others]


def test_nobody_goes_on_before_all_have_come():
    n, rounds = 4, 3
    came, early = [0] * rounds, []

    def attend(own: meeting.Meeting, late: float) -> None:
        for number in range(rounds):
            time.sleep(late)
            with lock:
                came[number] += 1
            own.wait()
            if came[number] < n:
                early.append(number)

    lock = threading.Lock()
    late = (0.2, 0, 0.1, 0)
    threads = [threading.Thread(target=attend, args=pair) for pair in zip(met(n), late, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert came == [n] * rounds and not early


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_rank_that_has_ended_is_noticed_by_all(gone):
    meetings = met(3)
    for way in meetings.pop(gone)._others:
        way.close()
    told = []

    def attend(own: meeting.Meeting) -> None:
        try:
            own.wait()
        except ConnectionError as error:
            told.append(str(error))
            for way in own._others:  # as the process does that ends with this error
                way.close()

    threads = [threading.Thread(target=attend, args=(own,)) for own in meetings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert told == ["another process of this run has ended, or cannot be reached"] * 2


def test_strangers_are_sent_away():
    door = meeting.invite("127.0.0.1")
    port = door.getsockname()[1]
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    strangers[0].sendall(b"GET / HTTP/1.0\r\n\r\n" + b" " * 99)
    strangers[1].close()
    strangers[2].sendall(meeting._HELLO.pack(1, b"?" * 32))
    threading.Thread(target=lambda: meeting.join("127.0.0.1", port, 1, TOKEN).wait()).start()
    own = meeting.receive(door, 2, TOKEN)
    own.wait()
    assert len(own._others) == 1


HOSTS = ("one", "two")
TWO_HOSTS = """
    import os, sys, time
    from utils.ranks import group as distributed
    from utils.ranks import meeting
    from utils.process import runtime

    meeting._GONE_S, meeting._PROBE_S = 9, 3  # not to make the test last for half a minute

    def main():
        ranks = distributed.Ranks()
        ranks.start(lambda: None)
        ranks.on_first(lambda: time.sleep(float(sys.argv[1])))
        assert ranks.gather_object(ranks.rank) == [0, 1]
        if sys.argv[2] == "fails":
            ranks.all_agree(lambda: os.stat("/none/of/two") if ranks.rank == 1 else None)
        if sys.argv[2] == "is gone" and ranks.rank == 1:
            os.system("ip link set two down")
            time.sleep(300)
        began = time.monotonic()
        try:
            ranks.gather_object(0)
        finally:
            print("waited", time.monotonic() - began < 20, flush=True)

    runtime.prepare()
    runtime.run(main)
"""


@pytest.fixture
def two_hosts():
    """Two network namespaces with a wire between them: a function that runs a script on both."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("only root can make network namespaces")
    names = [f"pet{os.getpid()}{host}" for host in HOSTS]

    def ip(command: str, of: int | None = None) -> bool:
        inside = [] if of is None else ["netns", "exec", names[of], "ip"]
        return subprocess.run(["ip", *inside, *command.split()], capture_output=True, check=False).returncode == 0

    if not all(ip(f"netns add {name}") for name in names):
        pytest.skip("network namespaces cannot be made here")
    ip(f"link add one netns {names[0]} type veth peer name two netns {names[1]}")
    for number, host in enumerate(HOSTS):
        ip(f"addr add 10.9.0.{number + 1}/24 dev {host}", number)
        ip("link set lo up", number)
        ip(f"link set {host} up", number)
    running: list[subprocess.Popen] = []

    def run(folder, *arguments):
        script = folder / "two_hosts.py"
        script.write_text(textwrap.dedent(TWO_HOSTS))
        for number, name in enumerate(names):
            launch = ["-m", "paddle.distributed.launch", "--nnodes", "2", "--rank", str(number)]
            launch += ["--host", f"10.9.0.{number + 1}", "--master", "10.9.0.1:23456", "--log_dir", folder / name]
            command = ["ip", "netns", "exec", name, sys.executable, *launch, script, *arguments]
            running.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=script_env(), start_new_session=True, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )  # fmt: skip
        return running, [folder / name / "workerlog.0" for name in names]

    yield run
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for name in names:
        ip(f"netns del {name}")


@pytest.mark.parametrize(
    ("seconds", "what", "message"),
    [
        (32, "fails", "error: [Errno 2] No such file or directory: '/none/of/two'"),  # beyond gloo's own 30 s
        (0, "is gone", "error: another process of this run has ended, or cannot be reached"),
    ],
)
def test_two_hosts(two_hosts, tmp_path, seconds, what, message):
    running, logs = two_hosts(tmp_path, str(seconds), what)
    assert running[0].wait(120) == 2
    assert message in logs[0].read_text()
    if what == "fails":
        assert running[1].wait(60) == 2
        assert message in logs[1].read_text()
    else:
        assert "waited True" in logs[0].read_text()
