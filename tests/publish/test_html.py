"""The report: self-contained, right numbers in its pictures, and drawn by a real browser."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from helpers import load
from PIL import Image

from sab_hf.publish import charts
from sab_hf.publish.html import evaluation_rows, html_report, plots, size_in_words
from sab_hf.publish.summary import spent, summarize

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def summary(vlm_dir, make_config):
    """A summary in which everything is known."""
    model = load(vlm_dir, quantization_config=make_config(refine_steps=2))
    scores = {"metrics": {"exact_match": 0.5}, "nll": 1.25}
    evaluation = {"data": "<builtin>", "seed": 1, "num_samples": 9, "model": scores, "original": scores, "kl": 0.125}
    found = summarize(model, evaluation=evaluation)
    for i, module in enumerate(found["modules"]):
        module["column_share"] = {"text": 0.01 * i, "image": 1 - 0.01 * i}
    found["record"]["stages"] = {"fit": {"seconds": 2.5}, "refinement": {"seconds": 7.5}}
    return json.loads(json.dumps(found))


def titles(svg: str) -> list[str]:
    """Return the tooltips of a picture."""
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}title")]


def test_every_picture_is_well_formed_and_every_kind_is_there(summary):
    pictures = plots(summary)
    for svg in pictures.values():
        assert ElementTree.fromstring(svg).tag == f"{SVG}svg"
    assert pictures.keys() == {
        "bits_language", "error_language", "budget_kinds", "budget_parts", "significance_columns_language",
        "significance_share_language", "significance_text_language", "significance_image_language",
        "significance_unimodal_language", "loss_by_stage", "time_by_stage",
    }  # fmt: skip


def test_cells_hold_the_numbers_of_the_modules(summary):
    pictures = plots(summary)
    for module in summary["modules"]:
        block, kind = re.search(r"layers\.(\d+)\.(.*)", module["name"]).groups()
        assert f"{kind}, block {block}: {module['bits']:.2f}" in titles(pictures["bits_language"])
        assert f"{kind}, block {block}: {module['error']:.3f}" in titles(pictures["error_language"])
        share = module["column_share"]["image"]
        assert f"{kind}, block {block}: {share:.2f}" in titles(pictures["significance_image_language"])


def test_budget_adds_up(summary):
    for role, kinds in spent(summary).items():
        assert sum(kinds.values()) == summary["roles"][role]["quantized_bytes"]
        assert f"{role}, signs: {size_in_words(kinds['signs'])}" in titles(plots(summary)["budget_kinds"])


def test_loss_by_stage_shows_both_stages(summary):
    svg = plots(summary)["loss_by_stage"]
    before, after = summary["record"]["refinements"][1]
    assert f"after the fit, block 1: {before:.4g}" in titles(svg)
    assert f"after refinement, block 1: {after:.4g}" in titles(svg)


def test_experts_of_a_block_share_a_row(summary):
    many = copy.deepcopy(summary)
    first = many["modules"][0]
    many["modules"] = [first | {"name": f"model.layers.0.mlp.experts.{i}.up_proj", "bits": 1.0 + i} for i in range(3)]
    assert "mlp.experts.up_proj, block 0: 2.00" in titles(plots(many)["bits_language"])


def test_blocks_of_encoder_and_decoder_have_rows_of_their_own(summary):
    both = copy.deepcopy(summary)
    first = both["modules"][0]
    both["modules"] = [
        first | {"name": f"model.{part}.layers.0.fc1", "bits": bits}
        for part, bits in (("encoder", 1.0), ("decoder", 2.0))
    ]
    assert {
        "model.encoder.layers.fc1, block 0: 1.00",
        "model.decoder.layers.fc1, block 0: 2.00",
    } <= set(titles(plots(both)["bits_language"]))


def test_evaluation_without_a_number_is_shown_as_such(summary):
    scores = {"metrics": {"exact_match": None}, "nll": None}
    assert evaluation_rows({"model": scores}) == [("exact match", "–", "–"), ("nats per token", "–", "–")]


def test_layers_without_significant_columns_are_left_out_of_their_map(summary):
    few = copy.deepcopy(summary)
    narrow = few["modules"][-1] | {"significant_columns": [0.5] * 8, "num_significant": 4}
    few["modules"] = [module | {"num_significant": 0} for module in few["modules"][:-1]] + [narrow]
    assert len(titles(plots(few)["significance_columns_language"])) == 8 + 16  # cells and the legend


def test_model_without_a_record_has_the_pictures_that_need_none(packed_dir):
    found = summarize(load(packed_dir))
    assert found["record"] is None
    assert plots(found).keys() == {
        "bits_language", "budget_kinds", "budget_parts", "significance_columns_language", "significance_share_language",
    }  # fmt: skip
    assert "Evaluation" not in html_report(found)


def test_page_needs_nothing_from_outside_and_escapes(summary):
    class Links(HTMLParser):
        def __init__(self):
            super().__init__()
            self.tags, self.links = [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)
            self.links += [value for name, value in attributes if name in ("href", "src")]

    page, parser = html_report(summary), Links()
    parser.feed(page)
    assert parser.links == []
    assert "script" not in parser.tags
    assert "url(" not in page
    assert "builtin" not in parser.tags  # the data's name, "<builtin>", is text
    assert parser.tags.count("svg") == len(plots(summary))


@pytest.mark.parametrize(
    ("most", "last"), [(0.15, 0.15), (0.9, 1.0), (7, 8), (0, 1.0), (float("inf"), 1.0), (1e-7, 1e-7)]
)
def test_ticks_are_round_and_reach_the_top(most, last):
    ticks = charts._ticks(most)
    assert ticks[0] == 0
    assert ticks[-1] == pytest.approx(last)
    assert 2 <= len(ticks) <= 7


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_browser_draws_the_report(summary, tmp_path):
    """The pictures are where the page says, in their colours; blank or broken pages have few colours."""
    (tmp_path / "report.html").write_text(html_report(summary), encoding="utf-8")
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,5000",
        f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "report.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (tmp_path / "page.png").is_file(), done.stderr
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    assert picture.size == (1000, 5000)
    colours = {colour: count for count, colour in picture.getcolors(2**20)}
    for series in charts.COLOURS[:5]:  # the five kinds of packed tensors
        assert colours.get(tuple(bytes.fromhex(series[1:])), 0) > 50
    for scale in (charts.BLUES, charts.ORANGES, charts.GREENS):
        assert colours.get(scale[1], 0) > 50  # the highest value of each heat map
