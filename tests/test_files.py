"""Files and printed lines are the same under any code page."""

import ast
import io
import sys
from pathlib import Path

import pytest

from flatmin._files import print_line, replace
from flatmin.book import claim

ROOT = Path(__file__).resolve().parent.parent


def test_text_is_read_and_written_with_an_encoding():
    """What ruff's PLW1514 does not see: methods of a path with a name.  Windows has a code page."""
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("assignments", "benchmarks", "book", "src", "tests", "tools")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") in ("read_text", "write_text")
        and "encoding" not in {keyword.arg for keyword in node.keywords}
    ]
    assert bare == []


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
