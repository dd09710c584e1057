"""Set up the environment of the book and the tests: what `make` calls when it is missing.

    python3 tools/install.py [FOLDER]      makes the virtual environment FOLDER (.venv), or completes one that is there

Versions are those of constraints.txt. A torch that is already in an environment of your own (one for your GPU, say) stays.
Written for Python 3.6 too, so that an old one can say that it is old.
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
    """Of what decides what is installed."""
    return hashlib.sha256(b"".join(open(path, "rb").read() for path in FILES)).hexdigest()


def read(path):
    return open(path).read() if os.path.exists(path) else ""


def ask(python, code):
    """What ``code`` prints in another Python, or "" if it raises."""
    done = subprocess.run(
        [python, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        universal_newlines=True,
    )  # noqa: UP021
    return done.stdout.strip() if done.returncode == 0 else ""


def make(home):
    """A new virtual environment."""
    if sys.version_info < (3, 11):  # noqa: UP036
        stop(
            f"Python 3.11 or newer is needed, and {sys.executable} is {sys.version_info[0]}.{sys.version_info[1]}. "
            "Name another one: make PYTHON=python3.12 ..., or python3.12 tools/install.py"
        )
    if subprocess.call([sys.executable, "-m", "venv", home]) != 0:
        shutil.rmtree(home, ignore_errors=True)
        stop(
            "no virtual environment could be made, see above. On Debian and Ubuntu: "
            f"sudo apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        )


def constraints(home, python, own):
    """The pins, without torch's where somebody else's torch is to stay."""
    torch = (
        ""
        if own
        else ask(python, "from importlib.metadata import version; print(version('torch'))")
    )
    if not torch:
        return FILES[1]
    print(f"setup: torch {torch} is there and stays")
    path = os.path.join(home, "flatmin-constraints.txt")
    pins = re.sub(r"^torch==.*$", "torch==" + torch, read(FILES[1]), flags=re.M)
    with open(path, "w") as file:
        file.write(pins)
    return path


def install(python, pins):
    """pip, with a line for each large download. True if it did it all."""
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
    if read(ready) == digest():  # only touched since: nothing to do, and no network needed
        os.utime(ready)
        return
    if not os.path.exists(python):
        make(home)
        open(mark, "w").close()
    elif not ask(python, "import sys; print(1 if sys.version_info >= (3, 11) else 1 / 0)"):
        stop(
            f"Python 3.11 or newer is needed, and {python} is older. Remove {home}, and name another: make PYTHON=python3.12 ..."
        )
    if not ask(python, "import pip; print(pip)"):
        stop(
            f"there is no pip in {home}: run {python} -m ensurepip, or remove the folder and try again"
        )
    print(
        f"setup: installing flatmin and its tools into {home}, once. Without a torch there it takes some minutes, and up to 6 GB on Linux",
        flush=True,
    )
    if not install(python, constraints(home, python, os.path.exists(mark))):
        stop(
            f"pip could not install everything, see above; {shutil.disk_usage(home).free / 1e9:.0f} GB are free on this disk. This step "
            "needs a network (later ones need none); what was downloaded is kept, so the same command goes on from there"
        )
    with open(ready, "w") as file:
        file.write(digest())
    print(f"setup: {home} is ready")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".venv")
