"""What others prepare in a folder that they may write to."""

import json
import os
import stat
import subprocess
import sys
import traceback

import numpy as np
import pytest
from conftest import ROOT

from utils.files import store as embedding_store
from utils.files.outputs import Outputs, write_whole
from utils.files.store import EmbeddingStore
from utils.process import own_files, runtime
from utils.search import bm25
from utils.training.folder import Journal

SECRET = b"the only copy"
OTHER_USER = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@pytest.fixture
def victim(tmp_path):
    """A file that nobody may write over."""
    path = tmp_path / "victim"
    path.write_bytes(SECRET)
    return path


def staged(folder):
    outputs = Outputs(str(folder / "out.jsonl"), [".report.json"])
    outputs.open_work()
    with outputs.stage() as stream:
        stream.write(b"rows")
    with outputs.stage(".report.json") as stream:
        stream.write(json.dumps({"outputs": outputs.names()}).encode())
    outputs.commit()
    return folder / "out.jsonl"


def filled(folder, finished=0):
    """A store of two batches, of which so many are written anew."""
    store = EmbeddingStore(folder, "0" * 64, 2, 3)
    done = store.open()
    for number in range(finished or 2):
        if number not in done:
            store.write([(number, np.array([number]), np.ones((1, 3), np.float32))])
    if not finished:
        store.finish()
    store.close()
    return store.folder / "vectors"


def derived(folder):
    embedding_store.derive(np.full((2, 3), 2, np.float32), folder / "derived")
    return folder / "derived"


def small(folder):
    write_whole(folder / "small.json", b"{}")
    return folder / "small.json"


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize(
    ("write", "planted"),
    [
        (staged, "out.jsonl.work/output.main"),
        (staged, "out.jsonl.work/output.report.json"),
        (filled, "0" * 32 + "/vectors.partial"),
        (filled, "0" * 32 + "/journal"),
        (filled, "0" * 32 + "/about.json.part"),
        (derived, "derived"),
        (small, "small.json.part"),
        (small, "small.json"),
    ],
)
def test_what_is_written_anew_takes_the_place_of_a_planted_link(tmp_path, victim, link, write, planted):
    place = tmp_path / "shared" / planted
    place.parent.mkdir(parents=True)
    if place.parent.name.endswith(".work"):
        (place.parent / "lock").touch()
    link(victim, place)
    written = write(tmp_path / "shared")
    assert victim.read_bytes() == SECRET
    assert written.stat().st_size > 0
    assert not written.is_symlink() and not os.path.samefile(written, victim)


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", ["vectors.partial", "journal"])
def test_a_store_does_not_go_on_in_a_planted_link(tmp_path, link, name):
    vectors = filled(tmp_path / "cache", finished=1)
    own = vectors.with_name(name)
    victim = tmp_path / "victim"
    victim.write_bytes(own.read_bytes())
    own.unlink()
    link(victim, own)
    before = victim.read_bytes()
    with pytest.raises((ValueError, OSError), match=name):
        filled(tmp_path / "cache")
    assert victim.read_bytes() == before


@pytest.mark.parametrize("exists", [True, False])
def test_no_lock_is_made_or_taken_through_a_link(tmp_path, victim, exists):
    (tmp_path / "work").mkdir()
    target = victim if exists else tmp_path / "made"
    (tmp_path / "work" / "lock").symlink_to(target)
    for is_given in (False, True):
        with pytest.raises(ValueError, match="lock: is in the way"):
            own_files.take_lock(tmp_path / "work", 0, is_given)
    assert target.exists() == exists


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(ValueError, match="lock: is in the way"):
        own_files.take_lock(tmp_path, 0)


def test_a_journal_of_a_training_is_not_written_through_a_link(tmp_path, victim):
    (tmp_path / "training.jsonl").symlink_to(victim)
    with pytest.raises(ValueError, match=r"training\.jsonl: is in the way"):
        Journal(tmp_path / "training.jsonl").add(1, {"loss": 1.0})
    assert victim.read_bytes() == SECRET


def test_a_link_to_a_work_folder_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "work").symlink_to(tmp_path / "real")
    with pytest.raises(ValueError, match="work: is in the way"):
        own_files.take_lock(tmp_path / "work", 0)
    own_files.take_lock(tmp_path / "work", 0, is_given=True).close()  # a training's folder may be one


def as_user(uid, act):
    """What ``act`` returns or raises, as text, in a child process with another user's rights."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            told = f"{act()}"
        except (ValueError, OSError) as error:
            told = f"{type(error).__name__}: {error}"
        except BaseException:  # noqa: BLE001 - told to the parent
            told = traceback.format_exc()
        os.write(writer, told.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader) as stream:
        return stream.read()


@as_root
@pytest.mark.parametrize("attacker_is_root", [True, False])
@pytest.mark.parametrize(("write", "name"), [(staged, "out.jsonl.work"), (filled, "0" * 32)])
def test_another_users_folder_is_refused(tmp_path, attacker_is_root, write, name):
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o777)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    attacker, victim = (0, OTHER_USER) if attacker_is_root else (OTHER_USER, 0)

    def plant():
        (shared / name).mkdir()
        (shared / name).chmod(0o777)
        (shared / name / "lock").touch(0o666)

    assert as_user(attacker, plant) == "None"
    told = as_user(victim, lambda: write(shared))
    assert told.startswith("ValueError") and "belongs to another user" in told and name in told


@as_root
def test_another_users_link_as_the_output_is_refused(tmp_path, victim):
    link = tmp_path / "out.jsonl"
    link.symlink_to(victim)
    staged(tmp_path)  # one's own link is followed
    assert victim.read_bytes() == b"rows"
    link.unlink(missing_ok=True)
    link.symlink_to(victim)
    os.lchown(link, OTHER_USER, OTHER_USER)
    with pytest.raises(ValueError, match="another user's link"):
        staged(tmp_path)


@pytest.mark.parametrize(
    "mode", [0o777, 0o775, pytest.param(None, marks=as_root, id="another user's")],
)  # fmt: skip
def test_a_cache_that_is_run_must_be_private(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = runtime.cache_root() / "jieba"
    assert own_files.is_private(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    if mode is None:
        os.chown(folder, OTHER_USER, OTHER_USER)
    else:
        folder.chmod(mode)
    assert not own_files.is_private(folder)
    with bm25._private_folder() as used:
        assert used != str(folder)


def test_machine_code_is_not_loaded_from_a_folder_that_others_may_write_to(tmp_path):
    """The sources lie in a copy that anybody may write to, and so does the user's cache."""
    program = "import logging; logging.basicConfig(level='INFO'); import numba; from utils.kernels import compiled; "
    program += "print(repr(numba.config.CACHE_DIR))"
    tree = tmp_path / "tree"
    tree.mkdir()
    subprocess.run(["cp", "-r", str(ROOT / "utils"), str(tree)], check=True)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("NUMBA_CACHE_DIR", None)

    def place():
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
        return eval(done.stdout), "machine code is kept nowhere" in done.stderr

    first, is_told = place()
    assert first.startswith(str(tree / "utils" / "__pycache__")) and not is_told
    os.chmod(first, 0o777)
    second, is_told = place()
    assert second.startswith(str(tmp_path / "cache")) and not is_told
    os.chmod(second, 0o777)
    assert place() == ("", True)
