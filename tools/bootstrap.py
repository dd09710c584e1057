import os, subprocess, sys
from importlib import invalidate_caches
from importlib.metadata import version
from importlib.util import find_spec

# As in Colab: install the package in this notebook's version, and keep the torch that is there.
if find_spec("flatmin") is None:
    keep = [f"{name}=={version(name)}" for name in ("torch", "numpy") if find_spec(name)]
    package = os.environ.get("FLATMIN_PIP", "flatmin[all] @ SOURCE")
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", package, *keep])
    invalidate_caches()
