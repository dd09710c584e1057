"""The playground: the arithmetic of flatmin, and a page that everyone can use.

All of it runs in Chromium, through the page's own scripts.  Reads FLATMIN_HTML, as test_web.
"""

import math
import re
from importlib.resources import files

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.func import functional_call, grad
from torch.nn.functional import binary_cross_entropy_with_logits
from web import AXE, HTML, RULES, TOO_WIDE, new_page, watched

from flatmin import Recipe
from flatmin._tree import flatten, unflatten
from flatmin.batch import Gaussian, Mixup
from flatmin.book import MLP
from flatmin.gradient import SAM, GradientPenalty
from flatmin.gradient.plain import PlainGradient
from flatmin.loss import Flooding
from flatmin.measure import hvp, sharpness, stiffness
from flatmin.optimizer import EMA, SGD
from flatmin.pipeline import Batch, State, step

pytestmark = pytest.mark.web

FOLDER = HTML / "_static" / "playground"
PAGE = HTML / "playground.html"
REST = "document.querySelector('#the-playground').dataset.playing === 'false'"
SEED = 0


@pytest.fixture(scope="module")
def lib(browser, address):
    """A function that runs a line of JavaScript with the page's `lib` and arguments."""
    with new_page(browser) as page:
        page.goto(f"{address}/playground.html")
        yield lambda code, **arguments: page.evaluate(
            "([code, names, values]) => new Function('lib', ...names, code)(playground.lib, ...values)",
            [code, [*arguments], [*arguments.values()]],
        )


# ------------------------------------------------------------------ one side in both languages


def cross_entropy(z, y):
    target = y[:, 1] if y.ndim == 2 else y.to(z.dtype)
    return binary_cross_entropy_with_logits(z[:, 0], target, reduction="none")


def quadratic(z, y):
    target = y[:, 1] if y.ndim == 2 else y.to(z.dtype)
    return (z[:, 0] - (2 * target - 1)) ** 2 / 2


DEFAULTS = {
    "layers": 2, "width": 6, "activation": "tanh", "loss": "cross-entropy", "flood_level": 0.0,
    "transform": "none", "alpha": 1.0, "sigma": 0.2, "gradient": "plain", "rho": 0.1, "p": 2.0,
    "adaptive": "no", "penalty": 0.1, "lr": 0.2, "momentum": 0.0, "weight_decay": 0.0, "ema": 0.0,
}  # fmt: skip


class Side:
    """A model with random weights and examples, and the recipe of flatmin for the settings."""

    def __init__(self, seed=SEED, n=9, **changes):
        self.settings = s = {**DEFAULTS, **changes}
        generator = torch.Generator().manual_seed(seed)
        randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        activation = {"tanh": nn.Tanh, "ReLU": nn.ReLU}[s["activation"]]
        self.model = MLP(2, *[s["width"]] * s["layers"], 1, activation=activation).double()
        self.shapes = {name: w.shape for name, w in self.model.named_parameters()}
        self.params = {name: 0.7 * randn(*shape) for name, shape in self.shapes.items()}
        self.x, self.y = randn(n, 2), torch.arange(n) % 2
        self.criterion = {"cross-entropy": cross_entropy, "quadratic": quadratic}[s["loss"]]
        lam, partners = (
            float(torch.rand(1, generator=generator)),
            torch.randperm(n, generator=generator),
        )
        weights = torch.tensor([lam, 1 - lam], dtype=torch.float64)[:, None].expand(2, n)
        noise = randn(n, 2)
        self.draw = {"weights": weights, "partners": partners[None], "noise": noise}
        self.js = {
            "settings": s,
            "w": flatten(self.params).tolist(),
            "x": self.x.flatten().tolist(),
            "y": self.y.tolist(),
            "draw": {
                "lambda": lam,
                "partners": partners.tolist(),
                "noise": noise.flatten().tolist(),
            },
        }

    @property
    def recipe(self):
        s = self.settings
        sam = SAM(s["rho"], s["p"], s["adaptive"] == "yes")
        return Recipe(
            batch={"none": None, "mixup": Mixup(s["alpha"]), "noise": Gaussian(s["sigma"])}[
                s["transform"]
            ],
            criterion=self.criterion,
            loss=Flooding(s["flood_level"]),
            gradient={
                "plain": PlainGradient(),
                "SAM": sam,
                "penalty": GradientPenalty(s["penalty"]),
            }[s["gradient"]],
            optimizer=EMA(SGD(s["lr"], s["momentum"], s["weight_decay"]), s["ema"]),
        )

    def train(self, steps):
        """(weights, average, loss of the last step) by flatmin."""
        state = State.init(self.recipe, self.params, {})
        batch = Batch(self.x, self.y, num_classes=2)
        for t in range(steps):
            state, loss = step(self.model, self.recipe, state, batch, self.draw, t)
        average = self.recipe.optimizer.evaluated(state.params, state.optimizer)
        return flatten(state.params), flatten(average), loss

    def network(self, params, x):
        return functional_call(self.model, params, (x,))

    def loss(self, w):
        return self.criterion(self.network(unflatten(w, self.shapes), self.x), self.y).mean()


THE_SIDE = """
    const {settings} = side, model = new lib.MLP(settings), recipe = lib.recipe(settings);
    const w = Float64Array.from(side.w);
    const batch = {x: Float64Array.from(side.x), y: Float64Array.from(side.y), n: side.y.length};
    const objective = lib.objective(model, batch, recipe.criterion, settings.flood_level);
"""
TRAIN = (
    THE_SIDE
    + """
    let state = {w, optimizer: recipe.optimizer.init(w)}, loss;
    for (let t = 0; t < steps; t++) ({state, loss} = lib.step(model, recipe, state, batch, side.draw));
    return {w: [...state.w], average: [...recipe.optimizer.evaluated(state.optimizer)], loss};
"""
)


def agree(found, wanted, tolerance=1e-9):
    """In the norm, relative to the wanted vector."""
    found, wanted = (torch.as_tensor(v, dtype=torch.float64).flatten() for v in (found, wanted))
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= tolerance * wanted.norm(), (found, wanted)


def assert_training_agrees(lib, side, steps=1):
    found = lib(TRAIN, side=side.js, steps=steps)
    w, average, loss = side.train(steps)
    agree(found["loss"], loss)
    # of what the steps changed, not of the weights, which hardly change
    start = flatten(side.params)
    for mine, theirs in ((found["w"], w), (found["average"], average)):
        agree(torch.tensor(mine, dtype=torch.float64) - start, theirs - start)


STAGES = {
    "plain": {},
    "quadratic": {"loss": "quadratic"},
    "linear": {"layers": 0},
    "one layer": {"layers": 1},
    "three layers of ReLU": {"layers": 3, "activation": "ReLU"},
    "mixup": {"transform": "mixup"},
    "noise": {"transform": "noise"},
    "flooding, above": {"flood_level": 0.01},
    "flooding, below": {"flood_level": 5.0},
    "SAM": {"gradient": "SAM"},
    "SAM, p = 1": {"gradient": "SAM", "p": 1.0},
    "SAM, p = inf": {"gradient": "SAM", "p": math.inf},
    "SAM, adaptive": {"gradient": "SAM", "adaptive": "yes"},
    "SAM, adaptive, p = 1": {"gradient": "SAM", "adaptive": "yes", "p": 1.0},
    "SAM, flooded": {"gradient": "SAM", "flood_level": 5.0},
    "penalty": {"gradient": "penalty"},
    "penalty, flooded": {"gradient": "penalty", "flood_level": 5.0},
    "momentum": {"momentum": 0.9},
    "weight decay": {"weight_decay": 0.1},
    "average": {"ema": 0.9},
    "everything": {
        "transform": "mixup", "flood_level": 5.0, "gradient": "SAM", "adaptive": "yes", "momentum": 0.5,
        "weight_decay": 0.01, "ema": 0.9, "activation": "ReLU", "layers": 3, "loss": "quadratic",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_one_step_is_that_of_flatmin(lib, name):
    assert_training_agrees(lib, Side(**STAGES[name]))


# 50 steps that stay where a rounding error does not grow
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "quadratic",
        "mixup",
        "noise",
        "SAM",
        "SAM, p = inf",
        "penalty",
        "momentum",
        "average",
    ],
)
def test_fifty_steps_are_those_of_flatmin(lib, name):
    assert_training_agrees(lib, Side(**{**STAGES[name], "lr": 0.05, "width": 4}), steps=50)


ANY = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "n": st.integers(2, 12),
        "layers": st.integers(0, 3),
        "width": st.integers(2, 8),
        "activation": st.sampled_from(["tanh", "ReLU"]),
        "loss": st.sampled_from(["cross-entropy", "quadratic"]),
        "flood_level": st.sampled_from([0.0, 0.3, 5.0]),
        "transform": st.sampled_from(["none", "mixup", "noise"]),
        "sigma": st.floats(0, 2),
        "gradient": st.sampled_from(["plain", "SAM", "penalty"]),
        "rho": st.floats(0, 1),
        "p": st.sampled_from([1.0, 2.0, math.inf]),
        "adaptive": st.sampled_from(["no", "yes"]),
        "penalty": st.floats(0, 1),
        "lr": st.floats(0.01, 1),
        "momentum": st.floats(0, 0.95),
        "weight_decay": st.floats(0, 0.1),
        "ema": st.floats(0, 0.99),
    }
)


@given(ANY)
@settings(max_examples=100)
def test_two_steps_of_any_settings_are_those_of_flatmin(lib, changes):
    assert_training_agrees(lib, Side(**changes), steps=2)


KINDS = [
    {"layers": layers, "activation": activation, "loss": loss, "width": 4}
    for layers in (0, 1, 3)
    for activation in ("tanh", "ReLU")
    for loss in ("cross-entropy", "quadratic")
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_gradient_hessian_and_largest_eigenvalue_are_those_of_autograd(lib, kind):
    side = Side(**kind)
    w = flatten(side.params)
    v = torch.randn(len(w), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = lib(
        THE_SIDE
        + """
        const product = v => objective.hessianProduct(w, v, true), start = Float64Array.from(v);
        const {value} = lib.largestEigenvalue(product, start, {tolerance: 1e-12, steps: 500});
        return {loss: objective.raw(w), gradient: [...objective.gradient(w, true).gradient],
                Hv: [...product(start)], value};""",
        side=side.js,
        v=v.tolist(),
    )
    agree(found["loss"], side.loss(w))
    agree(found["gradient"], grad(side.loss)(w))
    agree(found["Hv"], hvp(side.loss, w, v))
    H = torch.func.hessian(side.loss)(w)
    agree(found["value"], torch.linalg.eigvalsh(H)[-1])


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("adaptive", ["no", "yes"])
def test_the_perturbation_is_that_of_flatmin(lib, p, adaptive):
    side = Side(gradient="SAM", p=p, adaptive=adaptive)
    w = flatten(side.params)
    gradient = unflatten(grad(side.loss)(w), side.shapes)
    wanted = side.recipe.gradient.perturbation(side.params, gradient)
    found = lib(
        THE_SIDE + "return [...lib.perturbation(w, objective.gradient(w, true).gradient, ball)];",
        side=side.js,
        ball={"rho": 0.1, "p": p, "adaptive": adaptive == "yes"},
    )
    agree(found, flatten(wanted))


def test_equal_gradients_share_the_step_for_p_1(lib):
    found = lib("return [...lib.dualNormPerturbation(Float64Array.from([2, -2, 1]), 0.5, 1)];")
    assert found == [0.25, -0.25, 0]
    found = lib(
        "return [...lib.dualNormPerturbation(Float64Array.from([3e-170, -4e-170]), 0.5, 2)];"
    )
    agree(found, [0.3, -0.4])  # though the squares are too small for a number
    assert lib("return [...lib.dualNormPerturbation(new Float64Array(2), 0.5, 1)];") == [0, 0]


@pytest.mark.parametrize("scaled", ["no", "yes"])
@pytest.mark.parametrize("steps", [1, 5])
def test_sharpness_is_that_of_flatmin(lib, scaled, steps):
    side = Side()
    found = lib(
        THE_SIDE + "return lib.sharpness(objective, w, {rho: 0.5, adaptive, steps});",
        side=side.js,
        adaptive=scaled == "yes",
        steps=steps,
    )
    wanted = sharpness(
        side.network, side.params, side.x, side.y, rho=0.5, adaptive=scaled == "yes", steps=steps,
        criterion=side.criterion,
    )  # fmt: skip
    assert found > 0
    agree(found, wanted)


def test_stiffness_is_that_of_flatmin(lib):
    side = Side(n=12)
    found = lib(THE_SIDE + "return lib.stiffness(model, w, batch, recipe.criterion);", side=side.js)
    cosine = stiffness(side.network, side.params, side.x, side.y, criterion=side.criterion).cosine
    same = side.y[:, None] == side.y
    agree(found["within"], cosine[same & ~torch.eye(12, dtype=torch.bool)].mean())
    agree(found["between"], cosine[~same].mean())


def test_a_vanished_gradient_has_the_cosine_0_with_all_others(lib):
    side = Side(n=4)
    side.js["w"] = [1e3 * w for w in side.js["w"]]
    side.js["x"] = [1.0] * 8  # four equal inputs, two of each label: two gradients vanish
    found = lib(THE_SIDE + "return lib.stiffness(model, w, batch, recipe.criterion);", side=side.js)
    agree(found["within"], 0.5)
    assert found["between"] == 0
    side.js["y"] = [1, 1, 1, 1]
    found = lib(THE_SIDE + "return lib.stiffness(model, w, batch, recipe.criterion);", side=side.js)
    assert math.isnan(found["between"]), "no pair of two classes"


def test_the_plane_has_the_weights_in_its_middle_and_right_angles(lib):
    side = Side()
    found = lib(
        THE_SIDE
        + """
        const [d, f] = [1, 2].map(k => new lib.Stream(k, "d").normals(w.length)), e = lib.orthogonal(f, d);
        return {plane: [...lib.lossPlane(objective, w, d, e, 1, 3)], d: [...d], e: [...e], f: [...f]};""",
        side=side.js,
    )
    w, d, e, f = (
        torch.tensor(v, dtype=torch.float64)
        for v in (side.js["w"], found["d"], found["e"], found["f"])
    )
    assert abs(d @ e) < 1e-12 * d.norm() * e.norm()
    agree(e.norm(), f.norm())
    agree(
        found["plane"],
        torch.stack([side.loss(w + a * d + b * e) for b in (-1, 0, 1) for a in (-1, 0, 1)]),
    )


def test_the_slice_is_along_filters_as_long_as_the_weights(lib):
    side = Side()
    direction = torch.randn(len(side.js["w"]), dtype=torch.float64)
    found = lib(
        THE_SIDE
        + """
        const d = lib.filterNormalized(Float64Array.from(direction), w, model);
        return {d: [...d], line: [...lib.lossSlice(objective, w, d, 1, 5)]};""",
        side=side.js,
        direction=direction.tolist(),
    )
    d = unflatten(torch.tensor(found["d"], dtype=torch.float64), side.shapes)
    for name, w in side.params.items():
        if w.ndim == 1:
            assert not d[name].any()
        else:
            raw = unflatten(direction, side.shapes)[name]
            agree(d[name], raw * (w.norm(dim=1) / raw.norm(dim=1))[:, None])
    w, flat = flatten(side.params), flatten(d)
    agree(found["line"], torch.stack([side.loss(w + a * flat) for a in (-1, -0.5, 0, 0.5, 1)]))


def test_the_edge_is_where_a_swing_neither_grows_nor_dies(lib):
    run = "return lib.Run.prototype.edge.call({side, data: {train: {n: 10}}}, gradient);"
    plain = {**DEFAULTS, "batch_size": 10}
    edge = lambda **changes: lib(run, side={**plain, **changes}, gradient=0.3)
    agree(edge(), 10.0)
    agree(edge(momentum=0.6), 16.0)
    agree(edge(weight_decay=0.5), 9.5)
    sam = edge(gradient="SAM", rho=0.05)  # (8.10)
    agree(sam, 0.3 / 0.1 * (math.sqrt(1 + 8 * 0.05 / (0.2 * 0.3)) - 1))
    penalty = edge(gradient="penalty", penalty=0.3)
    agree(0.2 * penalty * (1 + 0.3 * penalty), 2.0)
    unknown = [
        {"ema": 0.9}, {"transform": "mixup"}, {"batch_size": 5}, {"gradient": "SAM", "p": 1.0},
        {"gradient": "SAM", "adaptive": "yes"}, {"weight_decay": 10.0}, {"flood_level": 0.1},
    ]  # fmt: skip
    for changes in unknown:
        assert math.isnan(edge(**changes)), changes
    assert edge(lr=0.0) == math.inf


# ---------------------------------------------------------------------------- readings and words

A_RUN = """
    const {state} = lib.readState(link), run = new lib.Run(state.shared, state.a);
    const advance = n => { for (let t = 0; t < n; t++) run.advance(); };
"""


def test_readings_are_thinned_and_the_last_stays(lib):
    found = lib(
        A_RUN
        + """
        run.readCurvature();
        for (let t = 0; t < 3000; t++) { run.advance(); run.read(); }  // as at a slow speed
        const slow = [...run.losses.step];
        advance(20000);
        return {slow, every: run.every, step: run.step, losses: run.losses.step, curvature: run.curvature.step};""",
        link="n=2&a.width=2&a.layers=1",
    )
    assert len(found["slow"]) <= 1200 and found["slow"][-1] == 3000
    assert {*range(0, 3000, 10)} <= {*found["slow"]}, "the regular ones are kept"
    assert found["every"] == 40 and found["losses"][-1] == found["step"] == 23000
    for steps, every in ((found["losses"], 40), (found["curvature"], 200)):
        assert {*range(0, 23000, every)} <= {*steps} and len(steps) <= 1200


def test_a_change_renews_what_it_touches(lib):
    found = lib(
        A_RUN
        + """
        advance(100);
        run.readCurvature();
        const now = () => ({...run.now(), readings: run.losses.step.length});
        const seen = [now()];
        for (const changes of [{lr: 0.5}, {loss: "quadratic"}, {flood_level: 0.5}]) {
            run.change({...run.side, ...changes});
            seen.push(now());
        }
        run.change(run.side, {...run.shared, radius: 0.5});
        return [...seen, now()];""",
        link="a.lr=0.2",
    )
    start, rate, loss, level, radius = found
    assert (start["edge"], rate["edge"]) == (10, 4)
    assert rate["train_loss"] == start["train_loss"] != loss["train_loss"]
    assert (start["readings"], rate["readings"], loss["readings"]) == (11, 11, 1)
    assert level["sharpness"] == loss["sharpness"] < radius["sharpness"]


@pytest.mark.parametrize(
    ("state", "steps", "words"),
    [
        ("a.lr=0.1", 0, "Nothing is trained yet"),
        ("a.lr=0.1&a.flood_level=0.1", 20, "still above the flood level"),
        ("a.lr=0&a.flood_level=5", 1, "below the flood level"),
        ("a.lr=0.01&a.flood_level=5", 20, "below the flood level, from where every step climbs"),
        ("a.lr=0.5&a.flood_level=0.2", 1000, r"^The loss has reached the flood level; .* 5\d %"),
        ("a.lr=0.5&a.flood_level=0.3&a.batch_size=5", 1000, "^The loss of a batch has reached"),
        ("a.lr=0.2&a.loss=quadratic&noise=0.2", 3000, "at its edge, and the weights swing"),
        ("a.lr=0.1&a.momentum=0.9&a.width=32&noise=0.2", 3000, "learned 20 of the 20 wrong labels"),
        ("a.lr=0&n=2&a.layers=0", 5, "every example the same answer"),
        ("a.lr=10&a.loss=quadratic", 50, "^Stopped at step .* longer than a million"),
    ],
)
def test_the_words_say_what_happens(lib, state, steps, words):
    said = lib(
        A_RUN + "advance(steps); run.readCurvature(); return lib.words(run);",
        link=state,
        steps=steps,
    )
    assert re.search(words, said), said


# ----------------------------------------------------------------------------- random numbers


def test_random_numbers_have_the_distributions_they_claim(lib):
    from scipy import stats

    numbers = lib("""const s = new lib.Stream(1, "test"), draw = f => Array.from({length: 4000}, f);
        return {uniform: draw(() => s.uniform()), normal: draw(() => s.normal()),
                beta: [0.2, 1, 4].map(a => draw(() => s.beta(a)))};""")
    assert stats.kstest(numbers["uniform"], "uniform").pvalue > 1e-3
    assert stats.kstest(numbers["normal"], "norm").pvalue > 1e-3
    for a, beta in zip((0.2, 1, 4), numbers["beta"], strict=True):
        assert stats.kstest(beta, stats.beta(a, a).cdf).pvalue > 1e-3
    first = lib("return [1, 2].map(seed => new lib.Stream(seed, 'a').uniform());")
    again = lib("return [1, 2].map(seed => new lib.Stream(seed, 'a').uniform());")
    assert first == again and first[0] != first[1]
    order = lib("return new lib.Stream(3, 'order').permutation(50);")
    assert sorted(order) == list(range(50)) and order != sorted(order)


@pytest.mark.parametrize("name", ["moons", "circles", "spiral", "sinusoid", "gaussians"])
def test_a_data_set_has_the_wrong_labels_that_were_ordered(lib, name):
    make = """const {train, test, reach} = lib.makeData({data: name, n: 100, noise, seed});
        return {x: [...train.x], y: [...train.y], clean: [...train.clean], test: [...test.y], reach};"""
    noisy, clean = (lib(make, name=name, noise=noise, seed=1) for noise in (0.2, 0.0))
    assert noisy["x"] == clean["x"] and noisy["clean"] == clean["y"]
    assert np.not_equal(noisy["y"], noisy["clean"]).sum() == 20
    assert 0.4 < np.mean(noisy["test"]) < 0.6
    assert np.mean(np.abs(noisy["x"]) < noisy["reach"]) > 0.99
    assert lib(make, name=name, noise=0.0, seed=2)["x"] != clean["x"]


# ------------------------------------------------------------------------------------ presets


def presets():
    text = (FOLDER / "presets.js").read_text(encoding="utf-8") if FOLDER.exists() else ""
    return re.findall(r"^    (\w+): \{$", text, re.M)


@pytest.mark.parametrize("name", presets())
def test_a_presets_promise_is_kept_for_eight_of_ten_seeds(lib, name):
    shown = lib(
        """
        const preset = lib.PRESETS[name], {shared, a, b} = lib.stateOf(name), shown = [];
        const sides = [a, ...(shared.sides === "2" ? [b] : []), ...(preset.also ? [{...a, ...preset.also}] : [])];
        const first = preset.firstSeed ?? 1;
        for (let seed = first; seed < first + 10; seed++) {
            const runs = sides.map(side => {
                const run = new lib.Run({...shared, seed}, side);
                run.readCurvature();
                for (let t = 0; t < preset.steps; t++) run.advance();
                run.readCurvature();
                return run;
            });
            shown.push(preset.shows(...runs));
        }
        return shown;""",
        name=name,
    )
    assert all(isinstance(each, bool) for each in shown)
    assert sum(shown) >= 8, shown


def test_each_preset_has_a_task_on_the_page():
    sections = re.findall(r'<span id="(\w+)"></span><h3>(.*?)<', PAGE.read_text(encoding="utf-8"))
    assert [key for key, _ in sections] == presets() and len(presets()) > 9
    assert {title[0] for _, title in sections} >= set("123456789"), "one for each lesson"


# ------------------------------------------------------------------------------------ the page


def opened(page, address, state=""):
    page.goto(f"{address}/playground.html#{state}")
    page.wait_for_selector(".playground-live")
    page.wait_for_selector("#the-playground[data-playing]")


def press(page, button):
    page.get_by_role("button", name=button, exact=True).click()


def steps(page):
    words = page.inner_text(".playground-counter")
    return int(re.match(r"step ([\d,]+)", words)[1].replace(",", ""))


def train(page, least=30):
    """Play until so many steps are done, and pause."""
    page.click("button.play")
    page.wait_for_function(
        "least => parseInt(document.querySelector('.playground-counter').textContent.slice(5).replace(',', '')) >= least",
        arg=least,
    )
    if page.inner_text("button.play") == "Pause":
        page.click("button.play")
    page.wait_for_function(REST)


def control(page, key):
    return page.locator(f"select[data-key='{key}']")


def readings(page, side="a"):
    rows = page.locator(".playground-readings tbody tr").all()
    return {row.locator("th").inner_text(): row.locator(f"td.{side}").inner_text() for row in rows}


def test_the_page_is_light():
    own = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert PAGE.stat().st_size + sum(path.stat().st_size for path in own) < 150_000
    assert not re.search(
        r"https?://", "".join(f.read_text(encoding="utf-8") for f in FOLDER.rglob("*.js"))
    )


def test_only_the_playground_loads_its_scripts():
    assert "page.js" in PAGE.read_text(encoding="utf-8")
    assert "_static/playground/" not in (HTML / "index.html").read_text(encoding="utf-8")


def test_it_trains_pauses_steps_and_restarts(browser, anywhere):
    with watched(browser, anywhere) as page:
        opened(page, anywhere)
        assert steps(page) == 0 and "initial weights" in page.inner_text(
            ".playground-words >> nth=0"
        )
        before = readings(page)
        train(page)
        done = steps(page)
        assert readings(page) != before
        press(page, "Step")
        page.wait_for_function(
            f"document.querySelector('.playground-counter').textContent.startsWith('step {done + 1:,}')"
        )
        press(page, "Restart")
        page.wait_for_function(
            "document.querySelector('.playground-counter').textContent === 'step 0'"
        )
        assert readings(page) == before


def test_a_run_pauses_where_it_was_told_and_is_repeated_by_its_link(browser, address):
    found = []
    for _ in range(2):
        with watched(browser, address) as page:
            opened(page, address, "preset=mixup&pause=200")
            train(page, 200)
            assert steps(page) == 200
            found.append([readings(page, side) for side in "ab"])
    assert found[0] == found[1] and found[0][0] != found[0][1]


def test_a_link_restores_a_state_and_back_undoes_a_change(browser, address):
    state = "preset=edge&seed=7&a.lr=0.123&b.momentum=0.9"
    with watched(browser, address) as page:
        opened(page, address, state)
        assert control(page, "shared.seed").input_value() == "7"
        assert control(page, "a.lr").input_value() == "0.123"
        assert control(page, "b.lr").input_value() == "0.4"  # the preset's
        assert control(page, "b.momentum").input_value() == "0.9"
        control(page, "a.gradient").select_option("SAM")
        page.wait_for_url(f"**#{state.replace('a.lr=0.123', 'a.gradient=SAM&a.lr=0.123')}")
        assert control(page, "a.rho").is_visible() and not control(page, "b.rho").is_visible()
        page.go_back()
        page.wait_for_url(f"**#{state}")
        assert control(page, "a.gradient").input_value() == "plain"
        press(page, "Copy settings A to B")
        assert control(page, "b.lr").input_value() == "0.123"


def test_a_lesson_links_to_a_task_and_other_sections_change_nothing(browser, address):
    with watched(browser, address) as page:
        page.goto(f"{address}/02_flooding.html")
        page.locator("a[href^='playground.html#']").click()
        page.wait_for_selector("#the-playground[data-playing]")
        assert page.locator("#playground-preset").input_value() == "ring"
        page.wait_for_url("**/playground.html#preset=ring")
        control(page, "a.lr").select_option("0.1")
        page.evaluate("location.hash = 'what-you-see'")
        page.evaluate("location.hash = 'main-content'")
        page.evaluate("new Promise(done => setTimeout(done, 100))")
        assert control(page, "a.lr").input_value() == "0.1"
        page.get_by_role("button", name="Try it").nth(2).click()
        assert page.locator("#playground-preset").input_value() == "early"
        assert page.evaluate("document.activeElement.textContent") == "Play"


def test_back_undoes_the_first_change_too(browser, address):
    with watched(browser, address) as page:
        page.goto(f"{address}/playground.html")
        page.wait_for_selector("#the-playground[data-playing]")
        control(page, "shared.seed").select_option("7")
        page.wait_for_url("**#preset=mixup&seed=7")
        page.go_back()
        page.wait_for_url("**#preset=mixup")
        assert control(page, "shared.seed").input_value() == "1"


def test_on_paper_there_is_the_picture(browser, address):
    with watched(browser, address) as page:
        opened(page, address)
        page.emulate_media(media="print")
        assert page.locator(".playground-recorded img").is_visible()
        assert not page.locator(".playground-live").is_visible()
        assert page.get_by_role("button", name="Try it").count() == 0


def test_every_state_survives_its_link(lib):
    """Written and read again, for each value that a control offers."""
    lost = lib("""
        const lost = [];
        for (const preset of ["none", ...Object.keys(lib.PRESETS)]) {
            for (const [part, specs] of [["shared", lib.SHARED], ["a", lib.SIDE_SETTINGS], ["b", lib.SIDE_SETTINGS]]) {
                for (const [key, spec] of Object.entries(specs)) {
                    for (const value of spec.choice ? Object.keys(spec.values) : spec.values) {
                        const state = lib.stateOf(preset);
                        state[part][key] = value;
                        const {state: again, problems} = lib.readState(lib.writeState(state));
                        if (problems.length || JSON.stringify(again) !== JSON.stringify(state)
                            || again[part][key] !== value) lost.push([preset, part, key, value]);
                    }
                }
            }
        }
        return lost;""")
    assert lost == []


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("a.lr=11", "a.lr must be a number from 0 to 10, got 11"),
        ("n=2.5", "n must be a whole number from 1 to 500, got 2.5"),
        ("a.p=3", "a.p must be a number from 1 to inf, one of 1, 2, inf, got 3"),
        (
            "data=mnist",
            "data must be one of moons, circles, spiral, sinusoid, gaussians, got mnist",
        ),
        ("b.rate=1", "there is no setting b.rate"),
        ("preset=cake", "preset must be none or one of memorize"),
        (
            "data=toString",
            "data must be one of moons, circles, spiral, sinusoid, gaussians, got toString",
        ),
        ("a.lr=%E0", "a.lr must be a number from 0 to 10, got %E0"),
        (
            "toString=1&a.__proto__=2",
            "there is no setting toString. there is no setting a.__proto__",
        ),
    ],
)
def test_what_a_link_says_wrong_is_said_and_the_rest_is_used(browser, address, state, message):
    with watched(browser, address) as page:
        opened(page, address, f"{state}&seed=5")
        assert message in page.inner_text(".playground-status")
        assert control(page, "shared.seed").input_value() == "5"
        train(page)


def test_it_obeys_the_keyboard_alone(browser, address):
    with watched(browser, address) as page:
        opened(page, address)
        page.locator("#playground-preset").focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowDown")
        assert page.locator("#playground-preset").input_value() == "memorize"
        focused = "document.activeElement.textContent"
        for _ in range(3):  # past "What should happen"
            page.keyboard.press("Tab")
            if page.evaluate(focused) == "Play":
                break
        assert page.evaluate(focused) == "Play"
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('button.play').textContent === 'Pause'")
        page.keyboard.press("Enter")
        page.wait_for_function(REST)
        stops = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            stops.add(page.evaluate("document.activeElement.dataset.key"))
        visible = page.locator("#the-playground select[data-key]:visible").evaluate_all(
            "all => all.map(e => e.dataset.key)"
        )
        assert len(visible) > 15 and set(visible) <= stops


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_accessible_and_fits_after_training(browser, address, width, scheme):
    view = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    with watched(browser, address, **view) as page:
        opened(page, address, "preset=together&view=plane")
        train(page)
        page.locator(".playground-task summary").click()
        assert page.evaluate(TOO_WIDE) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        pictures = page.locator("canvas:visible")
        assert pictures.count() == 10
        for picture in pictures.all():
            assert re.search(r"\d", picture.get_attribute("aria-label"))
            colours = picture.evaluate(
                "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
            )
            assert colours > 10
        page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
        contrast = "{runOnly: ['color-contrast'], resultTypes: ['violations'], preload: false}"
        inside = "{include: [['#the-playground']]}"
        assert page.evaluate(f"({AXE})([{inside}, {contrast}])") == []
        assert page.evaluate(f"({AXE})([document, {RULES}])") == []


def test_it_pauses_while_its_tab_is_hidden(browser, address):
    hide = """hidden => {
        Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    with watched(browser, address) as page:
        opened(page, address, "preset=none")
        page.click("button.play")
        page.wait_for_function("document.querySelector('button.play').textContent === 'Pause'")
        page.evaluate(hide, True)
        page.wait_for_function(REST)
        at = steps(page)
        page.evaluate(hide, False)
        page.wait_for_function(
            f"parseInt(document.querySelector('.playground-counter').textContent.slice(5).replace(',', '')) > {at}"
        )
        page.click("button.play")
        page.wait_for_function(REST)
        at = steps(page)
        page.evaluate(hide, True)
        page.evaluate(hide, False)  # what was paused stays so:
        press(page, "Step")  # a run that plays would take more than this one
        page.wait_for_function(REST)
        page.wait_for_function(
            f"!document.querySelector('.playground-counter').textContent.endsWith(' {at:,}')"
        )
        assert steps(page) == at + 1


EXTREME = [
    "n=1&noise=1&a.lr=10&a.gradient=SAM&a.rho=10&a.layers=3&a.activation=ReLU&a.loss=quadratic",
    "a.lr=10&a.loss=quadratic",
    "a.lr=10&a.momentum=0.95&a.gradient=penalty&a.penalty=1&a.loss=quadratic&a.activation=ReLU",
    "n=2&a.lr=10&a.weight_decay=0.1&a.gradient=SAM&a.rho=10&a.p=1&view=plane",
    "n=1&a.lr=0&a.batch_size=1&view=plane&a.layers=0",
    "a.rescaling=10&a.activation=ReLU&a.lr=10&a.transform=noise&a.sigma=1&sides=2&b.lr=0.1",
]


@pytest.mark.parametrize("state", EXTREME)
def test_extreme_settings_end_in_words_and_not_in_nan(browser, address, state):
    with watched(browser, address) as page:
        opened(page, address, f"{state}&pause=300")
        page.click("button.play")
        page.wait_for_function(
            "document.querySelector('.stopped') || document.querySelector('.playground-counter').textContent.startsWith('step 300')"
        )
        if "quadratic" in state:
            assert page.inner_text(".stopped").startswith("Stopped at step ")
        words = page.inner_text("#the-playground") + " ".join(
            page.locator("canvas").evaluate_all("all => all.map(c => c.getAttribute('aria-label'))")
        )
        assert "NaN" not in words and "Infinity" not in words
        shown = page.locator("canvas:visible").evaluate_all(
            "all => all.map(c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size)"
        )
        assert min(shown[:2]) > 3  # the map and the slice


def test_without_scripts_there_is_a_picture_and_a_reason(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}/playground.html")
    assert page.locator(".playground-recorded img").is_visible()
    assert "needs scripts" in page.inner_text(".playground-why")
    context.close()


def test_without_a_worker_there_is_a_picture_and_a_reason(browser, anywhere):
    with watched(browser, anywhere) as page:
        page.add_init_script(
            "window.Worker = class { constructor() { throw new Error('not here'); } };"
        )
        page.goto(f"{anywhere}/playground.html")
        page.wait_for_function(
            "document.querySelector('.playground-why').textContent.includes('not here')"
        )
        assert page.locator(".playground-recorded img").is_visible()
        assert page.locator(".playground-live").count() == 0
