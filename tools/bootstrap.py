import os, subprocess, sys
from importlib import invalidate_caches
from importlib.metadata import version
from importlib.util import find_spec

# As in Colab: install the package in this notebook's version, and keep the torch that is there.
# (A folder called flatmin beside the notebook has a spec, too, but no origin.)
if getattr(find_spec("flatmin"), "origin", None) is None:
    keep = [f"{name}=={version(name)}" for name in ("torch", "numpy") if find_spec(name)]
    package = os.environ.get("FLATMIN_PIP", "flatmin[all] @ SOURCE")
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", package, *keep])
    invalidate_caches()
