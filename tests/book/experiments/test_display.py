"""What a chapter shows of an experiment, recorded or not."""

import base64
import contextlib
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

from flatmin.book import experiments
from flatmin.book.experiments import display, flooding_synthetic

RECORDED = "flooding_synthetic"


@pytest.mark.parametrize("name", experiments.NAMES)
def test_a_caption_is_plain_words(name):
    with_records = [None]
    for size in experiments.records.experiment(name).SETTINGS:
        with contextlib.suppress(FileNotFoundError):
            with_records.append(experiments.record(name, size))
    for record in with_records:
        words = display.caption(name, record)
        assert len(words) > 40 and not re.search(r"[`*\n]|  ", words)


def test_a_record_of_many_levels_is_drawn_against_the_level():
    few, many = (experiments.record(RECORDED, size) for size in ("demo", "reduced"))
    assert display.caption(RECORDED, few) != display.caption(RECORDED, many)
    figure = experiments.plot(RECORDED, many)
    gains = flooding_synthetic.gains(many).mean("seed")
    ax = figure.axes[4]  # Adam, sinusoid
    expected = gains.sel(set="sinusoid", optimizer="Adam", label_noise=0.05)
    assert any(
        np.allclose(line.get_ydata(), expected) for line in ax.lines if len(line.get_xdata()) > 2
    )
    plt.close(figure)


def test_a_record_is_shown_with_its_origin():
    text = experiments.full_scale(RECORDED).data
    [(image, alt)] = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', text)
    assert base64.b64decode(image).startswith(b"\x89PNG") and alt == display.caption(
        RECORDED, experiments.record(RECORDED)
    )
    width, height = map(int, re.search(r'width="(\d+)" height="(\d+)"', text).groups())
    assert (
        300 < width < 1200 and 100 < height < 1200
    )  # the size is known before the picture loads, so nothing moves
    assert display.origin(experiments.record(RECORDED)) in text


@pytest.mark.parametrize("size", [None, "paper"])
def test_without_a_record_the_command_that_makes_one_is_shown(size, monkeypatch, tmp_path):
    monkeypatch.setattr(experiments.records, "FOLDERS", [tmp_path])
    text = experiments.full_scale(RECORDED, size).data
    command = f"python -m flatmin.book.experiments {RECORDED}" + (" --size paper" if size else "")
    assert "Not yet recorded" in text and f"`{command}`" in text and "<img" not in text


def test_bad_names_are_errors():
    with pytest.raises(ValueError, match="name must be one of .* got 'flood'"):
        experiments.full_scale("flood")
    with pytest.raises(ValueError, match="size must be one of .* got 'huge'"):
        experiments.full_scale(RECORDED, "huge")
