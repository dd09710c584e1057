"""Output that is the same under any code page: files, and lines printed."""

import os
import sys
from pathlib import Path
from typing import Any


def replace(path: Path, content: str | bytes) -> None:
    """Write a file as a whole, text in UTF-8; if interrupted, the old one is unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def print_line(text: Any) -> None:
    """Print, with ``?`` for what the output's code page lacks: on Windows a pipe knows no ✓."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(str(text).encode(encoding, "replace").decode(encoding), flush=True)
