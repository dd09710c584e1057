"""Files and printed lines are the same under any code page."""

import io
import sys

import pytest

from flatmin._files import print_line, replace
from flatmin.book import claim


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "page.md"
    replace(path, "✗ first\n")
    with pytest.raises(UnicodeEncodeError):
        replace(path, "second \ud800")  # half of a character
    assert path.read_bytes() == "✗ first\n".encode()
    replace(path, b"third")
    assert path.read_bytes() == b"third" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("encoding", "expected"), [("utf-8", "✓ ü\n"), ("cp1252", "? ü\n")])
def test_what_is_printed_suits_the_code_page(monkeypatch, encoding, expected):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    monkeypatch.setattr(sys, "stdout", out)
    print_line("✓ ü")
    claim("some-id", "a statement", True)
    out.flush()
    first, second = out.buffer.getvalue().decode(encoding).splitlines(keepends=True)
    assert first == expected and second[1:] == " some-id: a statement\n"
