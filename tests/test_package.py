"""What users get: few dependencies, a quick import, types, and a README that runs."""

import inspect
import re
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import flatmin
import flatmin.book
from flatmin import Runs

ROOT = Path(__file__).resolve().parent.parent
project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = {Requirement(line).name for line in project["dependencies"]}
EXTRAS = ["IPython", "matplotlib", "matplotlib_inline", "mnist1d", "pooch", "requests", "sklearn"]

# Simulates an environment with nothing but flatmin's required dependencies.
ONLY_CORE = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.split(".")[0] in {EXTRAS}
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def python(code, **options):
    """Run code in a new process and return what it printed."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_flatmin_imports_little_but_torch():
    """pandas, scipy.stats and torch._dynamo would each take as long as torch itself."""
    heavy = ["pandas", "scipy", "xarray", *EXTRAS]
    code = "import sys, torch; had = {*sys.modules}; import flatmin; print(*({*sys.modules} - had))"
    modules = python(code).split()
    loaded = {name.split(".")[0] for name in modules}
    assert "flatmin" in loaded and loaded & {*heavy} == set()
    assert "torch._dynamo" not in modules


def test_methods_and_fit_need_no_extra_and_a_missing_one_is_named():
    code = """
    import torch
    from torch import nn
    import flatmin
    from flatmin import SAM, BatchTransform, Recipe, fit, flood, gradient, gradient_penalty
    from flatmin.batch import Mixup
    from flatmin.book import MLP, pm, two_gaussians
    from flatmin.loss import Flooding

    torch.manual_seed(0)
    data, model = two_gaussians(train_size=40, test_size=40), MLP(10, 8, 2)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
    mixed = BatchTransform(Mixup(0.4), num_classes=2)
    x, y = mixed(data.x_train, data.y_train)

    def closure():
        optimizer.zero_grad()
        loss = flood(nn.functional.cross_entropy(model(x), y), 0.05)
        (loss + gradient_penalty(loss, model.parameters(), 0.01)).backward()
        return loss

    before = [w.clone() for w in model.parameters()]
    optimizer.step(closure)
    assert not any(torch.equal(v, w) for v, w in zip(before, model.parameters()))
    runs = fit(lambda: MLP(10, 8, 2), data, Recipe(loss=Flooding(), gradient=gradient.SAM()),
               steps=3, seeds=2, batch_size=None, grid={"flood_level": [0.0, 0.1]})
    assert "±" in pm(runs.test_loss.isel(step=-1, flood_level=0))
    trained = fit(lambda: MLP(10, 2), data, steps=3, batch_size=None, networks="last").networks
    assert trained.measure(flatmin.eigenvalues, data, "train").value.dims == ("seed", "eigenvalue")
    print("all ran")
    """
    needs = {
        "flatmin.book.mnist1d()": ("mnist1d()", "mnist1d", "data"),
        "flatmin.book.digits()": ("digits()", "sklearn", "data"),
        "import flatmin.book.plotting": ("flatmin.book.plotting", "matplotlib", "plot"),
        "import flatmin.book.explorable": ("flatmin.book.explorable", "matplotlib", "plot"),
    }
    attempt = "try:\n    {}\nexcept ImportError as error:\n    print(error)\n"
    out = python(ONLY_CORE + textwrap.dedent(code) + "".join(map(attempt.format, needs)))
    assert out.partition("all ran\n")[2].splitlines() == [
        f"{what} needs the package {package!r}, which is not installed: pip install 'flatmin[{extra}]'"
        for what, package, extra in needs.values()
    ]


def test_a_download_names_the_missing_extra(monkeypatch, tmp_path):
    monkeypatch.delenv("FLATMIN_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install 'flatmin\[data\]'"):
        flatmin.book.cifar10()


# ---------------------------------------------------------------------------------------- README


def blocks():
    """The README's Python, with fewer steps."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    return [re.sub(r"\bsteps=3000\b", "steps=30", block) for block in snippets]


def test_the_line_for_a_loop_of_your_own_runs():
    one_line = next(block for block in blocks() if "flood(criterion" in block)
    model = torch.nn.Linear(3, 2)
    names = {
        "criterion": torch.nn.CrossEntropyLoss(),
        "model": model,
        "x": torch.zeros(5, 3),
        "y": torch.zeros(5, dtype=torch.int64),
    }
    exec(one_line, names)
    raw = names["criterion"](model(names["x"]), names["y"])
    assert torch.equal(names["loss"], (raw - 0.05).abs() + 0.05)


def test_the_study_runs(capsys):
    study = next(block for block in blocks() if "fit(" in block)
    assert "steps=30," in study
    names = {}
    exec(study, names)
    assert isinstance(names["runs"], Runs) and names["runs"].sizes["seed"] == 5
    assert capsys.readouterr().out.count("<xarray.") == 2


def test_what_the_readme_names_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    also = re.search(r"Also included.*", text)[0]
    names = [name for name in re.findall(r"`([\w.]+)`", also)]
    assert len(names) > 5
    for name in names:
        owner, _, attribute = name.removeprefix("flatmin.").rpartition(".")
        module = __import__(f"flatmin.{owner}", fromlist=[""]) if owner else flatmin
        assert hasattr(module, attribute), name


# ------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [path] = folder.glob("flatmin-*.whl")
    return path


def test_the_wheel_has_types_records_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    records = {f"flatmin/book/results/{path.name}" for path in (ROOT / "results").glob("*.nc.xz")}
    assert {"flatmin/py.typed", "flatmin/gradient/sam.py"} | records <= names and records
    assert any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if name.split("/")[0].split("-")[0] != "flatmin"]


def test_the_wheel_is_small(wheel):
    """Even with the records of the book."""
    sizes = {info.filename: info.file_size for info in zipfile.ZipFile(wheel).infolist()}
    assert sum(n for name, n in sizes.items() if name.startswith("flatmin/book/results/")) < 2e6
    assert sum(sizes.values()) < 3e6


def test_the_wheel_runs_from_another_folder(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    code = f"""
    import sys
    sys.path.insert(0, {str(tmp_path)!r})
    import flatmin
    from flatmin.book.experiments import record
    assert flatmin.__file__.startswith({str(tmp_path)!r}), flatmin.__file__
    print(len(record("flooding_synthetic").data_vars) > 0, flatmin.__version__)
    """
    assert python(textwrap.dedent(code), cwd=tmp_path).split() == ["True", project["version"]]


def test_the_wheel_requires_only_the_core(wheel):
    file = zipfile.ZipFile(wheel)
    [path] = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
    lines = re.findall(r"^Requires-Dist: (.*)$", file.read(path).decode(), re.M)
    always = {r.name for r in map(Requirement, lines) if r.marker is None}
    assert always == CORE == {"torch", "numpy", "scipy", "xarray", "tqdm"}


# ------------------------------------------------------------------------------------------ types


def test_all_lists_every_public_name():
    """A strict checker lets users import only what __all__ names."""
    public = {
        name
        for name, thing in vars(flatmin).items()
        if name[0] != "_" and not isinstance(thing, type(flatmin))
    }
    assert sorted(public) == sorted(flatmin.__all__)


def test_everything_public_is_annotated():
    """Parameters and results of all public functions, and of the methods of all public classes."""
    missing = []
    for name in flatmin.__all__:
        thing = getattr(flatmin, name)
        methods = [m for n, m in vars(thing).items() if inspect.isfunction(m) and n[0] != "_"]
        for function in methods if inspect.isclass(thing) else [thing]:
            signature = inspect.signature(function)
            kinds = [p.annotation for n, p in signature.parameters.items() if n != "self"]
            if signature.empty in (*kinds, signature.return_annotation):
                missing.append(f"{name}: {function.__qualname__}")
    assert missing == []
