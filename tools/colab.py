"""Run chapters as Colab does: each alone, in an empty folder, and its first cell installs flatmin.

    python tools/colab.py [NAME ...]                     with this environment's packages, without a network
    python tools/colab.py --python python3.12 [NAME ...] with Colab's versions, from the package index

Before the first cell has run, only what Colab ships can be imported; it then installs a wheel of
this tree.  Fails if a notebook fails, or if installing flatmin replaces an installed package.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from notebooks import CRASHES, ROOT, chapters, key, read
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Colab's packages that matter here, in its versions of the end of 2025; torch is the newest one.
COLAB = {
    "torch": "",
    "numpy": "2.0.2",
    "pandas": "2.2.2",
    "scipy": "1.16.1",
    "xarray": "2025.7.1",
    "matplotlib": "3.10.0",
    "scikit-learn": "1.6.1",
    "ipykernel": "6.17.1",
    "ipython": "7.34.0",
    "requests": "2.32.4",
    "tqdm": "4.67.1",
    "pooch": "1.8.2",
    "pip": "",
}


def closure(*requirements):
    """The distributions of some requirements and of all that they need, as far as installed."""
    distributions, todo = {}, [Requirement(line) for line in requirements]
    while todo:
        requirement = todo.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in distributions:
            continue
        try:
            distributions[key] = distribution(requirement.name)
        except PackageNotFoundError:
            continue  # an optional dependency
        for line in distributions[key].requires or ():
            needed = Requirement(line)
            if not needed.marker or any(
                needed.marker.evaluate({"extra": extra}) for extra in (*requirement.extras, "")
            ):
                todo.append(needed)
    return {name: dist for (name, _), dist in distributions.items()}


def share(dists, folder):
    """Make a folder of links to installed packages, and to nothing else of their environment."""
    folder.mkdir(parents=True)
    for dist in dists:
        for name in {
            file.parts[0] for file in dist.files if file.parts[0] not in ("..", "__pycache__")
        }:
            if not (folder / name).exists():
                (folder / name).symlink_to(dist.locate_file(name))


def repack(dist, folder):
    """Turn an installed package back into a wheel."""
    with zipfile.ZipFile(
        folder / f"{dist.name.replace('-', '_')}-{dist.version}-py3-none-any.whl", "w"
    ) as wheel:
        for file in dist.files:
            if (
                ".." not in file.parts
                and file.suffix != ".pyc"
                and file.name not in ("INSTALLER", "REQUESTED", "direct_url.json")
            ):
                wheel.write(file.locate(), file.as_posix())


class Colab:
    """Environments like Colab's, in ``folder``: packages, an interpreter, and wheels to install."""

    def __init__(self, folder, python=None):
        self.folder, self.wheels, self.python = folder, folder / "wheels", python
        self.wheels.mkdir(parents=True)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "wheel",
                "-q",
                "--no-deps",
                "--no-build-isolation",
                "-w",
                self.wheels,
                ROOT,
            ],
            check=True,
        )
        [self.wheel] = self.wheels.glob("flatmin-*.whl")
        self.environment = {
            k: v
            for k, v in os.environ.items()
            if k not in ("PYTHONPATH", "MPLBACKEND", "FLATMIN_SEED")
        }
        if python:
            self.packages = self.download(python)
        else:
            preinstalled = closure(*COLAB)
            self.packages = folder / "packages"
            share(preinstalled.values(), self.packages)
            for name, dist in closure("flatmin[all]").items():
                if name not in preinstalled and name != "flatmin":
                    repack(dist, self.wheels)
            offline = {
                "PIP_CONFIG_FILE": os.devnull,
                "PIP_NO_INDEX": "1",
                "PIP_FIND_LINKS": str(self.wheels),
                "PIP_CONSTRAINT": "",
            }
            self.environment |= offline
        self.environment |= {
            "FLATMIN_PIP": f"flatmin[all] @ {self.wheel.as_uri()}",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }

    def download(self, python):
        """The packages in Colab's versions, in an environment that is kept for the next run."""
        home = ROOT / "_build" / "colab" / Path(python).name
        wanted = [f"{name}=={version}" if version else name for name, version in COLAB.items()]
        if not (home / "ready").exists() or read(home / "ready") != str(wanted):
            print(f"colab: downloading Colab's packages into {home}", flush=True)
            subprocess.run([python, "-m", "venv", "--clear", home], check=True)
            subprocess.run([interpreter(home), "-m", "pip", "install", "-q", *wanted], check=True)
            (home / "ready").write_text(str(wanted), encoding="utf-8")
        return Path(
            subprocess.run(
                [interpreter(home), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.strip()
        )

    def interpreter(self, name):
        """A new environment on top of the packages, which pip can extend but not change."""
        home = self.folder / name / "environment"
        if self.python:
            subprocess.run([self.python, "-m", "venv", "--without-pip", home], check=True)
        else:
            venv.create(home)
        python = interpreter(home)
        print_site = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.run(
            [python, "-c", print_site], check=True, capture_output=True, text=True
        ).stdout.strip()
        (Path(site) / "colab.pth").write_text(f"{self.packages}\n", encoding="locale")
        return python

    def installed(self, python):
        """{package: version}, as pip lists them."""
        command = [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
        out = subprocess.run(
            command, check=True, capture_output=True, text=True, env=self.environment
        ).stdout
        return {package["name"]: package["version"] for package in json.loads(out)}

    def run(self, path):
        """Execute a notebook. Returns it, and what the first cell added to the environment."""
        python = self.interpreter(key(path))
        before = self.installed(python)
        assert "flatmin" not in before
        kernel = self.folder / key(path) / "kernels" / "colab"
        kernel.mkdir(parents=True)
        argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (kernel / "kernel.json").write_text(
            json.dumps({"argv": argv, "display_name": "Colab", "language": "python"}),
            encoding="utf-8",
        )
        manager = AsyncKernelManager(
            kernel_name="colab",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(kernel.parent)]),
        )
        content = self.folder / key(path) / "content"
        content.mkdir()
        notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = []
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=1800,
            record_timing=False,
            resources={"metadata": {"path": content}},
        )
        # without cleanup_kc, a kernel of a given manager lives on and keeps its gigabyte
        client.execute(env=self.environment, cleanup_kc=True)
        after = self.installed(python)
        replaced = {
            name: (version, after.get(name))
            for name, version in before.items()
            if after.get(name) != version
        }
        if replaced:
            raise RuntimeError(f"the first cell replaced {replaced}")
        return notebook, {name: version for name, version in after.items() if name not in before}


def interpreter(home):
    """The Python of a virtual environment."""
    scripts = sysconfig.get_path("scripts", "venv", vars={"base": str(home), "platbase": str(home)})
    return Path(scripts) / f"python{'.exe' if os.name == 'nt' else ''}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python",
        help="the interpreter to download Colab's versions for; default: use this environment",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a chapter, or the start of its name; default: all"
    )
    arguments = parser.parse_args()
    paths, failed = chapters(arguments.names), []
    with TemporaryDirectory() as folder:
        colab = Colab(Path(folder).resolve(), arguments.python)
        for path in paths:
            start = time.monotonic()
            try:
                _, added = colab.run(path)
                outcome = f"ran in {time.monotonic() - start:.0f} s; installed {', '.join(f'{n} {v}' for n, v in added.items())}"
            except (*CRASHES, RuntimeError) as error:
                failed.append(key(path))
                outcome = f"FAILED\n{error}"
            print(f"  {key(path)}: {outcome}", flush=True)
    print(
        f"colab: {len(paths) - len(failed)} of {len(paths)} notebooks ran, each alone, nothing replaced"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
