"""The changes to each page before it is written, on small pieces of HTML."""

import base64
import io
import re

import html_postprocess as pages
import numpy as np
import pytest
from PIL import Image


def png(mode="RGBA"):
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, len(mode)), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise, mode=None).save(file, "png")
    return file.getvalue(), noise


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_picture_loses_nothing(tmp_path, mode):
    picture, pixels = png(mode)
    name = pages.as_webp(picture, tmp_path / "new")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / name)), pixels)
    assert pages.as_webp(picture, tmp_path / "new") == name


def test_an_embedded_picture_becomes_a_file(tmp_path):
    picture, _ = png()
    page = (
        f'<img alt="a" src="data:image/png;base64,{base64.b64encode(picture).decode()}" style="x">'
    )
    match = re.fullmatch(
        r'<img alt="a" src="\.\./_images/(\w+\.webp)" style="x">',
        pages.data_in_files(page, tmp_path, "../"),
    )
    assert (tmp_path / match[1]).exists()


@pytest.mark.parametrize("tag", ["i", "span"])
@pytest.mark.parametrize(
    "classes",
    ["theme-switch fa-solid fa-moon fa-lg", "fas fa-list", "fab fa-github", "fa-brands fa-github"],
)
def test_an_icon_is_drawn(classes, tag):
    drawn = pages.ICON.sub(pages.icon, f'<{tag} class="{classes}" title="t"></{tag}>')
    assert (
        drawn.startswith(f'<svg class="svg-inline--fa {classes}" title="t" aria-hidden="true"')
        and ' d="M' in drawn
    )


def test_scripts_are_deferred_only_once():
    page = '<script src="a.js"></script><script defer src="b.js"></script><script>x = 1</script><script>DOCUMENTATION_OPTIONS.pagename = "p";</script><script src="s/fontawesome.js?v=1"></script>'
    assert pages.deferred(page) == (
        '<script defer src="a.js"></script><script defer src="b.js"></script><script>x = 1</script>'
        '<script>addEventListener("DOMContentLoaded", () => { DOCUMENTATION_OPTIONS.pagename = "p"; });</script>'
    )


def test_figures_after_the_first_load_lazily_and_reserve_their_space():
    figure = '<img alt="a" src="_images/{}.webp" style="width: 700px; height: 300px;" />'
    page = pages.lazy('<img src="_static/logo.svg">' + figure.format(1) + figure.format(2))
    assert page.count('width="700" height="300"') == 2 and "style=" not in page
    assert [tag.count("lazy") for tag in re.findall("<img [^>]*>", page)] == [0, 0, 1]
    assert pages.lazy("<p>none</p>") == "<p>none</p>"


def test_every_table_scrolls_in_one_box():
    box = '<div class="pst-scrollable-table-container">'
    page = pages.accessible(
        f'<table class="a"><th class="head"><p></p></th><th>b</th></table>{box}<table>c</table></div>'
    )
    assert (
        page
        == f'{box}<table class="a"><td class="head"><p></p></td><th>b</th></table></div>{box}<table>c</table></div>'
    )
