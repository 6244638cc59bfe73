import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from utils.files import outputs as outputs_module
from utils.files.outputs import Outputs
from utils.process import own_files

SUFFIXES = (".removed.jsonl", ".report.json")


def write(path, suffixes=("",), inputs=()):
    outputs = Outputs(str(path), SUFFIXES)
    outputs.open_work(inputs)
    for suffix in suffixes:
        with outputs.stage(suffix) as stream:
            stream.write(
                json.dumps({"outputs": outputs.names()}).encode() if suffix == outputs_module.REPORT else b"new"
            )
    return outputs


def test_files_appear_together_at_commit(tmp_path):
    outputs = write(tmp_path / "new" / "out.json", ("", ".report.json"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.json.work"]
    outputs.commit()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out.json", "out.json.report.json"]


def test_a_run_that_fails_leaves_only_what_the_next_one_can_use(tmp_path):
    def fail(caches):
        with write(tmp_path / "out.json") as outputs:
            for path in [outputs.scratch("queries"), *(outputs.work / name for name in caches)]:
                path.write_text("vectors")
            raise KeyboardInterrupt

    vectors = "0" * 32
    for caches, left in (([], []), ([vectors, "neighbors-1"], [vectors, "lock", "neighbors-1"])):
        with pytest.raises(KeyboardInterrupt):
            fail(caches)
        assert sorted(path.name for path in tmp_path.glob("out.json.work/*")) == left
    write(tmp_path / "out.json").commit()  # and nobody holds its lock
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_commit_removes_what_an_earlier_run_left_beside_the_output(tmp_path):
    write(tmp_path / "out.json", ("", ".removed.jsonl", ".report.json")).commit()
    write(tmp_path / "out.json", ("", ".report.json")).commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.json.report.json"]


@pytest.mark.parametrize(
    "report", ["", "[1]", '{"outputs": "all"}', '{"outputs": ["out.json", "out.json.report.json"]}']
)
def test_what_no_report_tells_of_is_somebody_elses(tmp_path, report):
    (tmp_path / "out.json.removed.jsonl").write_text("precious")
    if report:
        (tmp_path / "out.json.report.json").write_text(report)
    with pytest.raises(ValueError, match="is in the way, and of no earlier run"):
        write(tmp_path / "out.json")
    assert (tmp_path / "out.json.removed.jsonl").read_text() == "precious"


def test_what_appears_beside_the_output_during_a_run_stays(tmp_path):
    outputs = write(tmp_path / "out.json", ("", ".report.json"))
    (tmp_path / "out.json.removed.jsonl").write_text("precious")
    outputs.commit()
    assert (tmp_path / "out.json.removed.jsonl").read_text() == "precious"


def test_a_kill_during_a_commit_leaves_nothing_that_a_rerun_refuses(tmp_path, monkeypatch):
    for n_done in range(3):
        folder = tmp_path / str(n_done)
        outputs, done = write(folder / "out.json", ("", ".removed.jsonl", ".report.json")), []

        def replace(source, target, done=done, n_done=n_done, replace=os.replace):
            if len(done) == n_done:
                raise KeyboardInterrupt
            done.append(replace(source, target))

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                outputs.commit()
        outputs.abandon()
        write(folder / "out.json", ("", ".report.json")).commit()
        assert sorted(path.name for path in folder.iterdir()) == ["out.json", "out.json.report.json"]


@pytest.mark.parametrize("name", ["out.json", "out.json.removed.jsonl", "out.json.report.json"])
def test_no_output_overwrites_an_input(tmp_path, name):
    (tmp_path / name).write_text("precious")
    os.symlink(tmp_path / name, tmp_path / "link")
    with pytest.raises(ValueError, match="would overwrite an input"):
        write(tmp_path / "out.json", inputs=[None, str(tmp_path / "link")])
    assert (tmp_path / name).read_text() == "precious"


def test_no_output_stands_where_a_cache_is_to_be_made(tmp_path):
    for name in ("out.json", "out.json/cache", "out.json.report.json"):
        with pytest.raises(ValueError, match="would overwrite an input"):
            Outputs(str(tmp_path / "out.json"), SUFFIXES).open_work(cache=str(tmp_path / name))
    (tmp_path / "out.json").write_text("old")
    Outputs(str(tmp_path / "out.json"), SUFFIXES).open_work(cache=str(tmp_path))  # it may lie in one


def test_what_a_folder_links_to_is_not_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "blob").write_text("precious")
    os.symlink(tmp_path / "blob", tmp_path / "model" / "config.json")
    with pytest.raises(ValueError, match="would overwrite an input"):
        write(tmp_path / "blob", inputs=[str(tmp_path / "model")])


def test_another_runs_output_is_no_file_beside_this_ones(tmp_path):
    every = ("", ".removed.jsonl", ".report.json")
    write(tmp_path / "out.json", every).commit()
    with pytest.raises(ValueError, match=r"was written beside out\.json, of another run"):
        write(tmp_path / "out.json.removed.jsonl")
    (tmp_path / "out.json").unlink()
    (tmp_path / "out.json.report.json").unlink()
    write(tmp_path / "out.json.removed.jsonl", every).commit()
    names = ["out.json", "out.json.removed.jsonl"]
    (tmp_path / "out.json.report.json").write_text(json.dumps({"outputs": names}))
    with pytest.raises(ValueError, match="another run's output is in the way"):
        write(tmp_path / "out.json")


def test_what_another_script_left_beside_the_output_goes(tmp_path):
    write(tmp_path / "out.json", ("", ".removed.jsonl", ".report.json")).commit()
    mined = Outputs(str(tmp_path / "out.json"), (".report.json", ".short.jsonl"))
    mined.open_work()
    for suffix in ("", ".report.json"):
        with mined.stage(suffix) as stream:
            stream.write(json.dumps({"outputs": mined.names()}).encode())
    mined.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.json.report.json"]
    write(tmp_path / "out.json", ("", ".removed.jsonl", ".report.json")).commit()


def test_what_another_script_left_is_kept_where_it_is_an_input(tmp_path):
    names = ["out.json", "out.json.report.json", "out.json.short.jsonl"]
    (tmp_path / "out.json.report.json").write_text(json.dumps({"outputs": names}))
    (tmp_path / "out.json.short.jsonl").write_text("precious")
    with pytest.raises(ValueError, match="would overwrite an input"):
        write(tmp_path / "out.json", inputs=[str(tmp_path / "out.json.short.jsonl")])


@pytest.mark.parametrize("name", ["../precious", "precious", "out.json2"])
def test_a_report_cannot_have_other_files_removed(tmp_path, name):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    path.write_text("precious")
    (tmp_path / "in" / "out.json.report.json").write_text(json.dumps({"outputs": ["out.json.report.json", name]}))
    write(tmp_path / "in" / "out.json", ("", ".report.json")).commit()
    assert path.read_text() == "precious"


def test_another_runs_output_that_took_a_files_place_stays(tmp_path):
    every = ("", ".removed.jsonl", ".report.json")
    write(tmp_path / "out.json", every).commit()
    outputs = write(tmp_path / "out.json", ("", ".report.json"))
    name = "out.json.removed.jsonl"
    (tmp_path / f"{name}.report.json").write_text(json.dumps({"outputs": [name]}))
    outputs.commit()
    assert (tmp_path / name).exists()


def test_an_interruption_after_the_commit_leaves_the_next_run_alone(tmp_path, monkeypatch):
    first, second, remove_done = write(tmp_path / "out.json", ("", ".report.json")), [], Outputs._remove_done

    def interrupted(self):
        monkeypatch.undo()
        remove_done(self)
        second.append(write(tmp_path / "out.json", ("", ".report.json")))
        raise KeyboardInterrupt

    monkeypatch.setattr(Outputs, "_remove_done", interrupted)
    with pytest.raises(KeyboardInterrupt), first:
        first.commit()
    second[0].commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.json.report.json"]


def test_what_a_kill_left_of_a_work_folder_goes(tmp_path):
    (tmp_path / "out.json.work.done-mine").mkdir()
    (tmp_path / f"out.json.work.done-{os.getpid()}").mkdir()
    (tmp_path / f"out.json.work.done-{os.getpid()}" / "vectors").write_text("")
    write(tmp_path / "out.json").commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.json.work.done-mine"]


def test_a_file_of_an_input_folder_is_kept_but_an_earlier_output_there_is_not(tmp_path):
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    for name in ("queries.jsonl", "qrels/test.tsv"):
        (tmp_path / "beir" / name).write_text("precious")
        with pytest.raises(ValueError, match="is a file of"):
            write(tmp_path / "beir" / name, inputs=[str(tmp_path / "beir")])
        assert (tmp_path / "beir" / name).read_text() == "precious"
    for _ in range(2):
        write(tmp_path / "beir" / "found.jsonl", ("", ".report.json"), [str(tmp_path / "beir")]).commit()


def test_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "out.json.report.json")
    for name in ("pipe", "out.json"):
        with pytest.raises(ValueError, match="is no regular file"):
            write(tmp_path / name)
    with pytest.raises(ValueError, match="is no regular file"):
        write("/dev/null")


def test_a_file_in_the_work_folders_place_is_left_alone(tmp_path):
    (tmp_path / "out.json.work").write_text("precious")
    with pytest.raises(ValueError, match=r"out\.json\.work: is in the way and no folder"):
        write(tmp_path / "out.json")
    assert (tmp_path / "out.json.work").read_text() == "precious"


def test_a_work_folder_that_holds_anothers_files_is_left_alone(tmp_path):
    work = tmp_path / "out.json.work"
    work.mkdir()
    write(tmp_path / "out.json").commit()  # empty, as a kill may leave it
    work.mkdir()
    (work / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="no work folder of an earlier run"):
        write(tmp_path / "out.json")
    (work / "lock").write_text("")
    with pytest.raises(ValueError, match="no work folder of an earlier run"):  # a training's folder has a lock, too
        write(tmp_path / "out.json")
    with pytest.raises(ValueError, match="is removed in the end"):
        write(tmp_path / "out.json", inputs=[str(work / "thesis.txt")])
    with pytest.raises(ValueError, match="is removed in the end"):
        Outputs(str(tmp_path / "out.json"), SUFFIXES).open_work(cache=str(work / "cache"))
    assert (work / "thesis.txt").read_text() == "precious"


def test_a_child_that_lives_on_does_not_hold_the_lock(tmp_path):
    lock = own_files.take_lock(tmp_path, 0)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    lock.close()
    again = own_files.take_lock(tmp_path, 5)  # it may not have begun yet
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert again is not None
    again.close()


def test_paths_that_cannot_be_written_are_refused_beforehand(tmp_path):
    (tmp_path / "out.json.report.json").mkdir()
    (tmp_path / "file").write_text("")
    for path, error in (
        (f"{tmp_path}/out.json", IsADirectoryError),
        (f"{tmp_path}/folder/", IsADirectoryError),
        (tmp_path / ("x" * 236), ValueError),
        (tmp_path / "file" / "out.json", OSError),
    ):
        with pytest.raises(error):
            Outputs(str(path), SUFFIXES).open_work()


def test_a_link_as_output_stays_a_link(tmp_path):
    (tmp_path / "real.json").write_text("old")
    os.symlink("real.json", tmp_path / "link.json")
    write(tmp_path / "link.json").commit()
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_bytes() == b"new"


def test_a_second_run_with_the_same_output_is_refused_until_the_first_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs_module, "LOCK_PATIENCE_S", 0.3)
    code = (
        "import sys, time; from utils.files.outputs import Outputs\n"
        f"outputs = Outputs({str(tmp_path / 'out.json')!r}, ()); outputs.open_work()\n"
        "print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another run is writing this output"):
            write(tmp_path / "out.json")
    finally:
        other.kill()
        other.wait()
    write(tmp_path / "out.json").commit()
    assert (tmp_path / "out.json").read_bytes() == b"new"
