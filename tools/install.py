"""Set up the environment of the book and the tests; `make` calls this when it is missing.

    python3 tools/install.py [FOLDER]      makes or completes the virtual environment FOLDER (.venv)

Versions are those of constraints.txt.  In an environment of your own, an installed torch (one for
your GPU, say) is kept.  The syntax is that of Python 3.6, so that an old Python can run this and
report that it is too old.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILES = [os.path.join(ROOT, name) for name in ("pyproject.toml", "constraints.txt")]
EXTRAS = ".[book,test,course]"


def stop(text):
    sys.exit("setup: " + text)


def digest():
    """A hash of the files that decide what is installed."""
    return hashlib.sha256(b"".join(open(path, "rb").read() for path in FILES)).hexdigest()


def read(path):
    return open(path).read() if os.path.exists(path) else ""


def output_of(python, code):
    """What ``code`` prints in another Python, or "" if it raises."""
    result = subprocess.run(
        [python, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        universal_newlines=True,
    )  # noqa: UP021
    return result.stdout.strip() if result.returncode == 0 else ""


def make(home):
    """A new virtual environment."""
    if sys.version_info < (3, 11):  # noqa: UP036
        stop(
            f"Python 3.11 or newer is needed, and {sys.executable} is {sys.version_info[0]}.{sys.version_info[1]}. "
            "Use another one: make PYTHON=python3.12 ..., or python3.12 tools/install.py"
        )
    if subprocess.call([sys.executable, "-m", "venv", home]) != 0:
        shutil.rmtree(home, ignore_errors=True)
        stop(
            "a virtual environment could not be made, see above. On Debian and Ubuntu: "
            f"sudo apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        )


def constraints(home, python, own):
    """The file of pins; unless the environment is our own, an installed torch keeps its version."""
    torch = (
        ""
        if own
        else output_of(python, "from importlib.metadata import version; print(version('torch'))")
    )
    if not torch:
        return FILES[1]
    print(f"setup: torch {torch} is installed and is kept")
    path = os.path.join(home, "flatmin-constraints.txt")
    pins = re.sub(r"^torch==.*$", "torch==" + torch, read(FILES[1]), flags=re.M)
    with open(path, "w") as file:
        file.write(pins)
    return path


def install(python, pins):
    """Run pip and print a line for each large download.  True if it succeeded."""
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "-c",
        pins,
        "-e",
        EXTRAS,
    ]
    pip = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, universal_newlines=True)  # noqa: UP021
    for line in pip.stdout:
        if re.search(r"Downloading .*\((\d{2,}(\.\d+)? MB|.* GB)\)|^Installing collected", line):
            print("  " + line.strip()[:100], flush=True)
    return pip.wait() == 0


def main(home):
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = os.path.join(home, scripts, "python.exe" if os.name == "nt" else "python")
    ready, mark = os.path.join(home, ".flatmin-ready"), os.path.join(home, ".made-by-flatmin")
    if read(ready) == digest():  # the files were only touched: nothing to do, no network needed
        os.utime(ready)
        return
    if not os.path.exists(python):
        make(home)
        open(mark, "w").close()
    elif not output_of(python, "import sys; print(1 if sys.version_info >= (3, 11) else 1 / 0)"):
        stop(
            f"Python 3.11 or newer is needed, and {python} is older. "
            f"Remove {home}, and use another one: make PYTHON=python3.12 ..."
        )
    if not output_of(python, "import pip; print(pip)"):
        stop(
            f"there is no pip in {home}: run {python} -m ensurepip, or remove the folder and try again"
        )
    print(
        f"setup: installing flatmin and its tools into {home}, once. "
        "If torch is not installed yet, it takes some minutes, and up to 6 GB on Linux",
        flush=True,
    )
    if not install(python, constraints(home, python, os.path.exists(mark))):
        stop(
            f"pip could not install everything, see above; {shutil.disk_usage(home).free / 1e9:.0f} GB are free on this disk. This step "
            "needs a network (later ones need none); downloads are kept: run the same command again"
        )
    with open(ready, "w") as file:
        file.write(digest())
    print(f"setup: {home} is ready")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".venv")
