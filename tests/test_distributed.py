"""The group's calls, in one process and, through a launched script, in three."""

import os
import textwrap

import numpy as np
import pytest
from conftest import run_script

from utils.ranks import group
from utils.ranks.group import Ranks


def test_one_process_is_the_identity():
    ranks = Ranks()
    array = np.arange(6.0).reshape(2, 3)
    assert ranks.start(lambda: "checked") == "checked"
    assert ranks.broadcast(array) is array
    assert ranks.gather_rows(array)[0] is array
    assert ranks.gather_object(5) == [5]
    assert ranks.mapped(array) is array
    assert list(ranks.broadcast_texts(["a", "b"])) == ["a", "b"]
    with pytest.raises(ValueError, match="bad"):
        ranks.on_first(lambda: (_ for _ in ()).throw(ValueError("bad")))


def test_the_interface_is_the_one_that_the_launcher_knows(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is undone, whatever is set below
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("PADDLE_CURRENT_ENDPOINT", "127.0.0.1:6170")
    group._name_the_network_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_what_gloo_says_becomes_one_line():
    with pytest.raises(ConnectionError, match="has ended"), group.through_gloo():
        raise RuntimeError("[/paddle/third_party/gloo/gloo/transport/tcp/pair.cc:584] TIMEOUT self_rank = 0")
    with pytest.raises(RuntimeError, match="no memory"), group.through_gloo():
        raise RuntimeError("no memory")


THREE_RANKS = """
    import sys
    import numpy as np
    from utils.ranks import group as distributed, shared_memory
    from utils.process import runtime

    def main():
        distributed._TEXTS_A_BLOCK = 2
        ranks = distributed.Ranks()
        # The second rank's processor has something that the others lack, and lacks something that they have.
        everything = runtime.cpu_flags() | {"common", "others"}
        runtime.keep_cpu_flags(everything - {"others"} | {"own"} if ranks.rank == 1 else everything)
        assert ranks.start(lambda: 7) == (7 if ranks.is_first else None)
        assert runtime.cpu_has("common") and not runtime.cpu_has("others") and not runtime.cpu_has("own")
        expected = np.arange(6, dtype=np.float32).reshape(2, 3)
        np.testing.assert_array_equal(ranks.broadcast(expected if ranks.is_first else None), expected)
        np.testing.assert_array_equal(ranks.broadcast(expected if ranks.is_first else None, (2, 3)), expected)
        assert [part.tolist() for part in ranks.gather_equal(np.array([ranks.rank]))] == [[0], [1], [2]]
        rows = ranks.gather_rows(np.full((ranks.rank, 2), ranks.rank, np.float64))
        assert [part.shape for part in rows] == [(0, 2), (1, 2), (2, 2)]
        assert (rows[2] == 2).all()
        assert (ranks._shared is not None) == shared_memory.is_possible()
        large = np.random.default_rng(ranks.rank).random((999, 777), np.float32)
        by_memory = ranks.gather_equal(large), ranks.broadcast(large if ranks.is_first else None)
        shared, ranks._shared = ranks._shared, None
        by_gloo = ranks.gather_equal(large), ranks.broadcast(large if ranks.is_first else None)
        ranks._shared = shared
        np.testing.assert_array_equal(by_memory[0], by_gloo[0])
        np.testing.assert_array_equal(by_memory[1], by_gloo[1])
        for name, rank in (("create", 0), ("SharedMemory", 2)):  # what one lacks, all do without
            works = getattr(shared_memory, name)
            if ranks.rank == rank:
                setattr(shared_memory, name, lambda *given: open("/none/none"))
            ranks._shared = None
            ranks._share_memory()
            assert ranks._shared is None
            setattr(shared_memory, name, works)
        texts = ["a", "问", "", "d", "e"]
        assert list(ranks.broadcast_texts(texts if ranks.is_first else None)) == texts
        assert ranks.gather_object(ranks.rank) == [0, 1, 2]
        np.save("rows.npy", expected) if ranks.is_first else None
        for own, there in ((np.load("rows.npy", mmap_mode="r") if ranks.is_first else None, True), (expected, False)):
            same = ranks.mapped(own if ranks.is_first else None)
            assert (same is not None) == there
            assert same is None or (same == expected).all()

        def fails_on_rank_1():
            if ranks.rank == 1:
                raise ValueError("rank 1 failed")

        for call in (ranks.all_agree, ranks.on_first):
            work = fails_on_rank_1 if call == ranks.all_agree else lambda: open("/none/none")
            try:
                call(work)
            except (ValueError, OSError):
                pass
            else:
                raise AssertionError("the error did not reach every rank")
        if ranks.is_first:
            open(sys.argv[1], "w").write("done")

    runtime.prepare()
    runtime.run(main)
"""


def test_three_ranks(tmp_path):
    script = tmp_path / "three.py"
    script.write_text(textwrap.dedent(THREE_RANKS))
    done = run_script(script, tmp_path / "done", nproc=3, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "done").read_text() == "done"
