import os
import socket

import pytest

from workbench.common.errors import UserError
from workbench.common.reading import read_lines, read_text, require_regular


def test_a_text_has_no_mark_and_one_kind_of_line_end(tmp_path):
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(tmp_path / "x", "it") == "one\ntwo\nthree\n"
    assert read_lines(tmp_path / "x", "it") == ["one", "two", "three", ""]


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # a socket's path has to be short
    socket.socket(socket.AF_UNIX).bind("socket")
    for name, kind in {
        "pipe": "a named pipe", "folder": "a folder", "device": "a device", "socket": "a socket",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"it: {name} is {kind}, not a file"):
            require_regular(tmp_path / name, "it")
    with pytest.raises(UserError, match="it: gone cannot be read"):
        read_text(tmp_path / "gone", "it")
