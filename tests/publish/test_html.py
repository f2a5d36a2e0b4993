"""The report: self-contained, right numbers in its pictures, its first screen, and drawn by a real browser at two widths."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from helpers import load, png_base64
from PIL import Image

from sab_hf.publish import charts
from sab_hf.publish.html import evaluation_rows, html_report, plots, size_in_words
from sab_hf.publish.palette import DARK, LIGHT, contrast, rgb
from sab_hf.publish.summary import spent, summarize, with_evaluation
from sab_hf.publish.verdicts import BAD, GOOD, NEUTRAL, verdicts

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SVG = "{http://www.w3.org/2000/svg}"


SPEED = {"device": "a machine", "prompt_tokens": 40, "first_token_ms": 20.0, "token_ms": 4.0}
SCORES = {"metrics": {"exact_match": 0.5, "anls": 0.75}, "nll": 1.25, "speed": SPEED}
EXAMPLE = {
    "question": "How many?", "accepted": ["3", "three"], "given": "2", "given_by_original": "3", "right": False,
    "original_right": True, "picture": png_base64((30, 90, 200)),
}  # fmt: skip
EVALUATION = {
    "data": "<builtin>", "seed": 1, "num_samples": 9, "num_questions": 9, "model": SCORES, "original": SCORES, "kl": 0.125,
    "answer_agreement": 1.0, "examples": [EXAMPLE, EXAMPLE | {"right": True, "given": "three"}],
}  # fmt: skip
TASK = {
    "task": "chartqa",
    "dataset": "a/b",
    "metric": "relaxed_overall",
    "num_samples": 500,
    "model": 0.6,
    "original": 0.8,
}
TASKS = {
    "harness": "lmms-eval 1.0", "seed": 1, "num_samples": 500,
    "scores": [
        TASK | {"model_error": 0.02, "original_error": 0.02, "higher_is_better": True},
        TASK | {"task": "a_task_with_a_name_of_many_words", "metric": "perception_score", "model": 1450.0, "original": 1490.5},
        TASK | {"task": "unfinished", "original": None},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def summary(vlm_dir, make_config):
    """A summary in which everything is known."""
    model = load(vlm_dir, quantization_config=make_config(refine_steps=2))
    found = with_evaluation(summarize(model, evaluation=EVALUATION), TASKS)
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
        "significance_unimodal_language", "loss_by_stage", "time_by_stage", "scores_tasks", "scores_answers",
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
    assert len(titles(plots(few)["significance_columns_language"])) == 8


def test_model_without_a_record_has_the_pictures_that_need_none(packed_dir):
    found = summarize(load(packed_dir))
    assert found["record"] is None
    assert plots(found).keys() == {
        "bits_language", "budget_kinds", "budget_parts", "significance_columns_language", "significance_share_language",
    }  # fmt: skip
    page = html_report(found)
    assert "Answers to questions" not in page
    assert "Scores by task" not in page


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
    assert len(parser.links) == 2
    assert all(re.fullmatch(r"data:image/png;base64,[\w+/=]+", link) for link in parser.links)
    assert "script" not in parser.tags
    assert "url(" not in page.replace("url(#hatching-", "")
    assert "builtin" not in parser.tags  # the data's name, "<builtin>", is text
    assert parser.tags.count("svg") == len(plots(summary)) + 1  # the hatchings
    assert "default-src 'none'" in html.unescape(page)


@pytest.mark.parametrize(
    ("most", "last"), [(0.15, 0.15), (0.9, 1.0), (7, 8), (0, 1.0), (float("inf"), 1.0), (1e-7, 1e-7)]
)
def test_ticks_are_round_and_reach_the_top(most, last):
    ticks = charts._ticks(most)
    assert ticks[0] == 0
    assert ticks[-1] == pytest.approx(last)
    assert 2 <= len(ticks) <= 7


# ---- the first screen


def test_first_screen_answers_good_big_and_fast(summary):
    good, big, fast = verdicts(summary)
    assert (good.tone, good.sign, good.figure) == (BAD, "▼", f"{(0.6 / 0.8 + 1450 / 1490.5) / 2:.1%}")
    assert good.sentences[1] == "Lower by more than chance: chartqa, a_task_with_a_name_of_many_words."
    assert big.figure == size_in_words(summary["total_bytes"])
    assert fast.figure == "250 tokens/s"
    assert "The original takes 4 ms (1.0×)" in fast.sentences[0]
    page = html_report(summary)
    places = [
        page.index(question)
        for question in ("Is it still good?", "How big is it?", "How fast is it?", "Scores by task")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("model", "original", "count", "tone", "words"),
    [
        (0.9, 0.9, 100, GOOD, "No loss beyond chance was found (±8.3 points)"),
        (0.9, 0.91, 100, GOOD, "No loss beyond chance"),
        (0.8, 1.0, 330, BAD, "It lost 20.0 points (±4.3)"),
        (0.97, 1.0, 10000, BAD, "It lost 3.0 points (±0.3)"),
        (0.95, 0.5, 10, GOOD, "No loss beyond chance"),
        (0.5, None, 10, NEUTRAL, "the original was not asked"),
    ],
)
def test_loss_of_right_answers_is_seen_against_chance(summary, model, original, count, tone, words):
    scores = {"model": {"metrics": {"exact_match": model}, "nll": 1.0}, "num_questions": count}
    if original is not None:
        scores["original"] = {"metrics": {"exact_match": original}, "nll": 1.0}
    found = verdicts(summary | {"tasks": None, "evaluation": EVALUATION | {"original": None} | scores})[0]
    assert found.tone == tone
    assert found.figure.startswith(f"{model:.1%}")
    assert words in " ".join(found.sentences)


def test_lower_is_better_where_a_task_says_so(summary):
    score = TASK | {"higher_is_better": False, "model": 2.0, "original": 3.0, "model_error": 0.1, "original_error": 0.1}
    better = verdicts(summary | {"tasks": TASKS | {"scores": [score]}})[0]
    worse = verdicts(summary | {"tasks": TASKS | {"scores": [score | {"model": 4.0}]}})[0]
    assert (better.tone, worse.tone) == (GOOD, BAD)


def test_what_was_not_measured_says_how_to_measure_it(packed_dir):
    found = verdicts(summarize(load(packed_dir)))
    assert [verdict.figure for verdict in found if verdict.commands] == ["not measured", "not measured"]
    assert "sab-hf eval CHECKPOINT --original ORIGINAL --output evaluation.json" in found[0].commands


def test_right_and_wrong_are_told_in_words(summary):
    page = re.sub(r"<[^>]*>", "", html_report(summary))
    assert "✗ wrong model: 2" in page
    assert "✓ right model: three" in page
    assert page.count("✓ right original: 3") == 2


# ---- colours


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrasts_are_enough(theme):
    for ground in (theme.paper, theme.panel):
        for text in (theme.ink, theme.soft, theme.good, theme.bad):
            assert contrast(text, ground) >= 4.5
    for fill in theme.series:
        assert contrast(fill, theme.paper) >= 3
    for scale in theme.scales:
        shades = theme.steps(scale)
        assert all(contrast(ink, fill) >= 4.5 for fill, ink in shades)
        assert contrast(shades[0][0], shades[-1][0]) >= 4.5  # low and high


def test_contrast_is_that_of_the_guidelines():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert contrast("#123456", "#123456") == 1


# ---- in a browser


def chromium(page, tmp_path, *options: str) -> str:
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_browser_draws_the_report(summary, tmp_path):
    """The pictures are where the page says, in their colours; blank or broken pages have few colours."""
    (tmp_path / "report.html").write_text(html_report(summary), encoding="utf-8")
    chromium(tmp_path / "report.html", tmp_path, "--window-size=1000,5000", f"--screenshot={tmp_path / 'page.png'}")
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    assert picture.size == (1000, 5000)
    colours = {colour: count for count, colour in picture.getcolors(2**20)}
    for series in LIGHT.series[:5]:  # the five kinds of packed tensors
        assert colours.get(rgb(series), 0) > 20
    for scale in ("blue", "orange", "green"):
        assert colours.get(rgb(LIGHT.scales[scale][1]), 0) > 50  # the highest value of each heat map


MEASURE = """
const found = {};
const done = [390, 1280].map(width => new Promise(resolve => {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0;color-scheme:light dark`;
  frame.srcdoc = PAGE;
  frame.onload = () => {
    const inner = frame.contentDocument, view = frame.contentWindow;
    const outside = [], texts = [], faint = [], broken = [];
    const channels = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => {
      const [r, g, b] = channels(colour).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    for (const node of inner.querySelectorAll("body *")) {
      const own = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
      const style = view.getComputedStyle(node);
      if (!own || node.tagName === "title" || style.display === "none") continue;
      const range = inner.createRange();
      range.selectNodeContents(node);
      const box = range.getBoundingClientRect();
      if (!box.width) continue;
      texts.push(node.textContent);
      if (node.classList.contains("number") && !/ /.test(node.textContent.trim()) && range.getClientRects().length > 1)
        broken.push(node.textContent);
      if (box.left < 0 || box.right > width || node.scrollWidth > node.clientWidth + 1 && style.overflowX !== "visible")
        outside.push(`${node.textContent}: ${box.left} to ${box.right}`);
      if (node.namespaceURI.endsWith("svg")) continue;
      let ground = node;
      while (ground && /, 0\\)$|transparent/.test(view.getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
      const [a, b] = [style.color, ground ? view.getComputedStyle(ground).backgroundColor : "rgb(255,255,255)"].map(light);
      if (Math.max(a, b) / Math.min(a, b) < 4.5) faint.push(node.textContent);
    }
    const shown = inner.scrollingElement;
    const plots = [...inner.querySelectorAll(".chart")].map(chart => chart.getBoundingClientRect().width);
    found[width] = {scroll: shown.scrollWidth, outside, faint, broken, count: texts.length, paper: view.getComputedStyle(
      inner.querySelector("main")).backgroundColor, plots: Math.min(...plots),
      screen: inner.querySelector(".verdicts").getBoundingClientRect().bottom};
    resolve();
  };
  document.body.append(frame);
}));
Promise.all(done).then(() => { document.body.innerHTML = ""; document.body.textContent = JSON.stringify(found); });
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_report_fits_phone_and_desk(summary, dark, tmp_path):
    """At 390 and 1,280 pixels: nothing scrolls sideways, no text is cut or faint, and the first screen has its answers."""
    many = copy.deepcopy(summary)  # 28 blocks, as in a model of 7 billion weights
    many["modules"] = [
        module | {"name": re.sub(r"layers\.\d+", f"layers.{i}", module["name"])}
        for i in range(28)
        for module in summary["modules"][: len(summary["modules"]) // 2]
    ]
    page = json.dumps(html_report(many)).replace("</", "<\\/")
    file = tmp_path / "measure.html"
    file.write_text(f"<!DOCTYPE html><body><script>const PAGE = {page};{MEASURE}</script>", encoding="utf-8")
    options = ["--blink-settings=preferredColorScheme=0"] if dark else []
    dom = chromium(file, tmp_path, "--window-size=1400,1000", "--virtual-time-budget=20000", "--dump-dom", *options)
    found = json.loads(html.unescape(re.search(r"<body>(.*)</body>", dom, re.DOTALL)[1]))
    theme = DARK if dark else LIGHT
    for width in (390, 1280):
        seen = found[str(width)]
        assert seen["outside"] == []
        assert seen["faint"] == []
        assert seen["broken"] == []
        assert seen["scroll"] == width
        assert seen["count"] > 100
        assert seen["paper"] == "rgb({}, {}, {})".format(*rgb(theme.paper))
        assert seen["plots"] > 150
        assert seen["screen"] < 844  # the height of a phone's screen
