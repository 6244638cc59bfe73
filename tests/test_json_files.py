import os

import pytest

from utils.files import json_files

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("before", [b"", BOM])
def test_reads_with_and_without_a_byte_order_mark(tmp_path, before):
    (tmp_path / "a.json").write_bytes(before + '{"问": [1, null]}'.encode())
    assert json_files.read(tmp_path / "a.json") == json_files.read_object(tmp_path / "a.json") == {"问": [1, None]}


def test_a_file_that_is_not_there_says_nothing(tmp_path):
    assert json_files.read(tmp_path / "a.json") is None and json_files.read_object(tmp_path / "a.json") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "a.json: is [1]; expected a JSON object"),
        (b"null", "a.json: is None; expected a JSON object"),
        (b"[" + b"1, " * 1000 + b"1]", "a.json: is [1, 1, "),
        (b"", "a.json: cannot be read as JSON (Expecting value"),
        (b'{"a": 1} {', "cannot be read as JSON (Extra data"),
        (b'{"a": "\xff"}', "cannot be read as JSON ('utf-8' codec"),
        (b"[" * 100_000, "cannot be read as JSON (maximum recursion depth"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "cannot be read as JSON (Exceeds the limit"),
    ],
)
def test_what_is_no_object_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        json_files.read_object(tmp_path / "a.json")
    found = str(caught.value).removeprefix(str(tmp_path))
    assert message in found and found.endswith("; expected a JSON object") and len(found) < 200
    with pytest.raises(ValueError, match="; expected what was left"):
        json_files.read_object(tmp_path / "a.json", "what was left")


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "file").write_text("{}")
    for path in (tmp_path, tmp_path / "pipe.json"):
        with pytest.raises(ValueError, match="is no regular file"):
            json_files.read(path)
    with pytest.raises(NotADirectoryError, match=r"file/a\.json: cannot be read"):
        json_files.read(tmp_path / "file" / "a.json")


def test_what_is_written_is_read_again(tmp_path):
    json_files.write(tmp_path / "a.json", {"问": [1.5, None]})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "问": [\n    1.5,\n    null\n  ]\n}\n'.encode()
    assert json_files.read(tmp_path / "a.json") == {"问": [1.5, None]}
