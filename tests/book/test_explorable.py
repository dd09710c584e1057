"""Explorable figures: the script gets exactly the data, and text cannot break out of it."""

import base64
import json
import re
from html.parser import HTMLParser

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from flatmin.book.explorable import Panel, explorable

PANEL = Panel(
    lines={
        "level": ([0, 1], [0.2, 0.2]),
        "loss": ([0, 0.5, 1], [[0, 1, 2], [3, np.nan, 5]]),
        "point": ([[0.1], [0.9]], [[1 / 3], [2 / 3]]),
    },
    colors={"level": "#111111", "loss": "#0072b2", "point": "#d55e00"},
    title="T",
    xlabel="X",
    ylabel="Y",
    xlim=(0, 1),
    ylim=(-1, 5),
    dashed=["level"],
    dots=["point"],
)


def make(**changes):
    arguments = {
        "id": "fig",
        "panels": [PANEL],
        "knob": "b",
        "values": [0.1, 0.25],
        "alt": "A line.",
        "notes": ["one", "two"],
    } | changes
    return explorable(**arguments).data


class Elements(HTMLParser):
    """The page's elements, and the text inside each script, as a browser parses them."""

    def __init__(self, text):
        super().__init__()
        self.found, self.scripts, self.text = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.found and self.found[-1][0] == "script" and self.scripts and self.cdata_elem:
            self.scripts[-1] += data
        else:
            self.text.append(data)

    def the(self, tag):
        (attributes,) = [a for t, a in self.found if t == tag]
        return attributes


def data_of(text):
    (script,) = Elements(text).scripts
    start = script.index("data = ") + len("data = ")
    return json.JSONDecoder(parse_constant=pytest.fail).raw_decode(script[start:])[0]


def test_data_comes_back_from_the_script():
    data = data_of(make())
    assert data["values"] == [["0.1", "0.25"]]
    assert data["notes"] == ["one", "two"]
    (panel,) = data["panels"]
    assert [panel[k] for k in ("title", "xlabel", "ylabel", "xlim", "ylim")] == [
        "T",
        "X",
        "Y",
        [0, 1],
        [-1, 5],
    ]
    assert len(panel["yticks"]) >= 3 and 0 in panel["yticks"]
    assert all(-1 <= tick <= 5 for tick in panel["yticks"])
    lines = {line["label"]: line for line in panel["lines"]}
    assert list(lines) == ["level", "loss", "point"]
    assert lines["level"]["x"] == [[0, 1]]  # one frame for all
    assert lines["level"]["y"] == [[0.2, 0.2]]
    assert lines["loss"]["x"] == [[0, 0.5, 1]]
    assert lines["loss"]["y"] == [[0, 1, 2], [3, None, 5]]  # a gap
    assert lines["point"]["x"] == [[0.1], [0.9]]
    np.testing.assert_allclose(lines["point"]["y"], [[1 / 3], [2 / 3]], rtol=1e-3)
    assert [line["color"] for line in lines.values()] == list(PANEL.colors.values())
    assert [line["dashed"] for line in lines.values()] == [True, False, False]
    assert [line["dots"] for line in lines.values()] == [False, False, True]


def test_numbers_from_numpy_are_accepted():
    panel = Panel(
        {"a": (np.arange(3), np.ones((2, 3), np.float32))},
        {"a": "red"},
        xlim=(np.int64(0), np.int64(2)),
        ylim=np.array([0, 1]),
    )
    data = data_of(make(panels=[panel], values=np.array([0.1, 0.2])))
    assert data["panels"][0]["xlim"] == [0, 2]
    assert data["panels"][0]["lines"][0]["x"] == [[0, 1, 2]]
    assert data["values"] == [["0.1", "0.2"]]


def test_slider_and_start():
    page = Elements(make(start=1))
    knob = page.the("input")
    assert (knob["type"], knob["min"], knob["max"], knob["value"]) == ("range", "0", "1", "1")
    assert page.the("label")["for"] == knob["id"] == "fig-knob"


def test_nothing_is_loaded_from_the_network():
    text = make()
    assert set(re.findall(r"[a-z]+://[^\"' )]*", text)) == {"http://www.w3.org/2000/svg"}  # a name
    page = Elements(text)
    assert [a["src"][:22] for _, a in page.found if "src" in a] == ["data:image/png;base64,"]
    assert not [a for _, a in page.found if "href" in a]
    for word in ("fetch(", "XMLHttpRequest", "import(", "@import", "url(http"):
        assert word not in text


def test_without_scripts_a_picture_of_the_first_frame_is_shown(monkeypatch):
    drawn = []
    savefig = plt.Figure.savefig
    monkeypatch.setattr(
        plt.Figure, "savefig", lambda fig, *a, **k: (drawn.append(fig), savefig(fig, *a, **k))
    )
    figures = plt.get_fignums()
    page = Elements(make(start=1))
    picture = page.the("img")
    assert picture["alt"] == "A line."
    assert base64.b64decode(picture["src"].split(",")[1]).startswith(b"\x89PNG")
    assert plt.get_fignums() == figures  # and no figure stays open
    (fig,) = drawn
    lines = {line.get_label(): line for line in fig.axes[0].lines}
    np.testing.assert_array_equal(lines["loss"].get_ydata(), [3, np.nan, 5])
    assert fig.get_suptitle() == "b = 0.25"
    hidden = [a for t, a in page.found if t == "div" and a.get("class") in ("stage", "controls")]
    assert all("display:none" in a["style"] for a in hidden) and len(hidden) == 2


NASTY = "</script><img src=x onerror=alert(1)> \"'&<!-- <script> @DATA@ @PNG@ @KNOB@ \u2028 ü"


def test_text_stays_text():
    panel = Panel({NASTY: ([0], [0])}, {NASTY: "red"}, title=NASTY, xlabel="x", ylabel="y")
    with plt.rc_context({"text.parse_math": False}):
        text = make(panels=[panel], alt=NASTY, knob=NASTY, values=[NASTY, "2"], notes=[NASTY, ""])
    page = Elements(text)
    assert [tag for tag, _ in page.found] == [
        "div",
        "img",
        "div",
        "div",
        "div",
        "label",
        "output",
        "input",
        "span",
        "script",
    ]
    assert page.the("img")["alt"] == NASTY
    assert any(NASTY in part for part in ["".join(page.text)])
    data = data_of(text)
    assert data["values"][0][0] == data["notes"][0] == NASTY
    assert data["panels"][0]["title"] == data["panels"][0]["lines"][0]["label"] == NASTY
    (script,) = page.scripts
    assert "<!--" not in script and "</" not in script
    assert script.rstrip().endswith("})();")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"id": 'a"b'}, r"id must be a letter.*got 'a\"b'"),
        ({"id": "two words"}, r"id must be a letter.*got 'two words'"),
        ({"id": ""}, r"id must be a letter.*got ''"),
        ({"panels": []}, r"panels must be at least one"),
        ({"values": [], "notes": []}, r"at least 1"),
        ({"notes": ["one"]}, r"notes must be one per value \(2, at least 1\), got 1"),
        ({"start": 2}, r"start must be between 0 and 1, got 2"),
        ({"start": -1}, r"start must be between 0 and 1, got -1"),
        (
            {"panels": [Panel({"a": ([0, 1], np.zeros((3, 2)))}, {"a": "red"})]},
            r"line 'a' must have 1 or 2 frames, as many as values, got 3",
        ),
        (
            {"panels": [Panel({"a": ([0, 1], [1, 2, 3])}, {"a": "red"})]},
            r"line 'a' must have as many x as y, got 2 and 3",
        ),
        ({"panels": [Panel({"a": ([0], [1])}, {"b": "red"})]}, r"colors must have .* none for 'a'"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_several_knobs_make_a_frame_for_every_combination():
    lines = {"line": ([0, 1], [[k, k] for k in range(6)])}
    panel = Panel(lines, {"line": "red"}, ylim=(0, 6))
    text = make(
        panels=[panel], knob=["b", "rate"], values=[[0.1, 0.2], ["x", "y", "z"]], notes=(), start=4
    )
    sliders = [a for t, a in Elements(text).found if t == "input"]
    assert [(s["id"], s["max"], s["value"]) for s in sliders] == [
        ("fig-knob", "1", "1"),
        ("fig-knob1", "2", "1"),
    ]
    assert data_of(text)["values"] == [["0.1", "0.2"], ["x", "y", "z"]]
    assert data_of(text)["panels"][0]["lines"][0]["y"][4] == [4, 4]
    with pytest.raises(ValueError):  # a value list is missing
        make(knob=["b", "rate"], values=[[0.1, 0.2]])
