"""Reports, evaluations, configs from elsewhere: names are checked, text is escaped, a wrong form is an error with its place."""

from __future__ import annotations

import base64
import copy
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import load, png_base64
from huggingface_hub import ModelCard

from sab_hf.cli import main
from sab_hf.publish.card import find_license, model_card
from sab_hf.publish.form import check_summary, picture_format, printable, read_evaluation
from sab_hf.publish.html import html_report, plots
from sab_hf.publish.summary import summarize, with_evaluation
from sab_hf.publish.templating import as_code, as_text

EVIL = (
    "</td><script>alert(1)</script> ![x](http://a.b/c.png) [l](js:1) `code` | cell\n# head\n<img src=x onerror=y> _i_"
)


@pytest.fixture(scope="module")
def summary(vlm_dir, make_config):
    speed = {"device": "CPU", "prompt_tokens": 9, "first_token_ms": 2.5, "token_ms": 1.5}
    scores = {"metrics": {"exact_match": 0.5}, "nll": 1.25, "speed": speed}
    example = {
        "question": "Q",
        "accepted": ["A"],
        "given": "A",
        "given_by_original": "B",
        "right": True,
        "original_right": False,
    }
    evaluation = {"data": "builtin", "seed": 1, "num_samples": 9, "model": scores, "original": scores, "kl": 0.125}
    evaluation |= {
        "answer_agreement": 0.5,
        "num_questions": 9,
        "examples": [example | {"picture": png_base64((9, 9, 9))}],
    }
    score = {"task": "chartqa", "dataset": "a/b", "metric": "acc", "num_samples": 9, "model": 0.5, "original": 0.75}
    score |= {"model_error": 0.1, "original_error": 0.1, "higher_is_better": True}
    tasks = {"harness": "lmms-eval", "seed": 1, "num_samples": None, "scores": [score]}
    model = load(vlm_dir, quantization_config=make_config(refine_steps=1))
    return json.loads(json.dumps(with_evaluation(summarize(model, evaluation=evaluation), tasks)))


@pytest.fixture
def report(saved, tmp_path):
    """Return a function that copies a checkpoint, changes its report with `change`, and runs `sab-hf card` on it."""

    def run(change) -> tuple[int, Path]:
        path = tmp_path / "folder" / "saved"
        shutil.copytree(saved, path)
        content = json.loads((path / "report.json").read_text())
        changed = change(content)
        (path / "report.json").write_text(json.dumps(content if changed is None else changed))
        return main(["card", str(path)]), path

    return run


def test_reports_of_every_kind_have_the_form(summary, saved):
    check_summary(summary, Path("report.json"))
    check_summary(json.loads((saved / "report.json").read_text()), Path("report.json"))


def replaced(content, place, value):
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return content


WRONG = {
    ("modules", 0, "role"): ("../../escaped", r"the report\.modules\[0\]\.role must be one of \['language'"),
    ("modules", 0, "column_share"): (
        {"../x": 0.5, "text": 0.5},
        r"the report\.modules\[0\]\.column_share, a key, must be one",
    ),
    ("modules", 1, "bits"): ("many", r"the report\.modules\[1\]\.bits must be a number, got 'many'"),
    ("modules", 0, "significant_columns"): ([], r"significant_columns must be a list of at least 1, got \[\]"),
    ("modules", 0, "in_features"): (0, r"in_features must be a whole number above 0, got 0"),
    ("modules", 0, "name"): ("a\x1b[2Jb", r"modules\[0\]\.name must be text without control characters, got 'a\\x1b"),
    ("modules",): ({"a": 1}, r"the report\.modules must be a list of at least 1, got \{'a': 1\}"),
    ("roles",): ({"../x": {}}, r"the report\.roles, a key, must be one of"),
    ("total_bytes",): (10**400, r"the report\.total_bytes must be a whole number above 0"),
    ("bits",): (float("nan"), r"the report\.bits must be a number, got nan"),
    ("bytes_at_16_bits",): (True, r"must be a whole number above 0, got True"),
    ("model_class",): ("os; import os", r"the report\.model_class must be the name of a class"),
    ("config",): ([1], r"the report\.config must be an object, got \[1\]"),
    ("record", "refinements"): ([[1]], r"the report\.record\.refinements\[0\] must be a list of 2, got \[1\]"),
    ("evaluation", "model"): ({}, r"the report\.evaluation\.model must have the key 'metrics'"),
    ("evaluation", "examples", 0, "picture"): (
        png_base64((9, 9, 9)) + '" onload="alert(1)',
        r"the report\.evaluation\.examples\[0\]\.picture: a picture must be base64",
    ),
    ("evaluation", "examples", 0, "right"): ("yes", r"examples\[0\]\.right must be true or false, got 'yes'"),
    ("evaluation", "model", "speed"): ({}, r"model\.speed must have the key 'device'"),
    ("tasks", "scores"): ([], r"the report\.tasks\.scores must be a list of at least 1"),
    ("tasks", "scores", 0, "model"): ("all", r"the report\.tasks\.scores\[0\]\.model must be a number"),
    ("versions", "torch"): (None, r"the report\.versions\.torch must be text"),
}


@pytest.mark.parametrize("place", WRONG, ids=[".".join(map(str, place)) for place in WRONG])
def test_a_wrong_form_is_an_error_that_names_file_and_place(summary, place):
    value, message = WRONG[place]
    with pytest.raises(ValueError, match=rf"^folder/report\.json: .*{message}") as error:
        check_summary(replaced(summary, place, value), Path("folder/report.json"))
    assert len(str(error.value)) < 300


def test_pages_can_be_made_of_whatever_has_the_form(summary):
    """Each part of a report is left out, emptied or replaced in turn: it is refused, or its pages can be made."""
    refused = made = 0
    for place in _places(summary):
        for value in (None, "", [], {}, -1, 1e308, "x", {"x": "y"}, [None]):
            changed = replaced(summary, place, value)
            try:
                check_summary(changed, Path("report.json"))
            except ValueError:
                refused += 1
                continue
            made += 1
            html_report(changed)
            str(model_card(changed))
    assert min(refused, made) > 50


def _places(content, place=()):
    """Return the places of a report, those of the first entry of each list alone, and not all settings."""
    found = [place] if place else []
    inner = (
        content.items() if isinstance(content, dict) else enumerate(content[:1]) if isinstance(content, list) else ()
    )
    for key, value in list(inner)[: 8 if place == ("config",) else None]:
        found += _places(value, (*place, key))
    return found


def test_card_writes_no_file_that_a_report_names(report, capsys):
    def change(content):
        for module in content["modules"]:
            module["role"] = "../../../escaped"

    code, path = report(change)
    assert code == 1
    assert "report.json: the report.modules[0].role must be one of" in capsys.readouterr().err
    assert not list(path.parents[1].rglob("*escaped*"))


@pytest.mark.parametrize("content", [[], 5, None, "text", {"total_bytes": 1}, {"other": "program"}])
def test_card_of_a_report_of_another_form(report, capsys, content):
    def change(known):
        return content | {"total_bytes": known["total_bytes"]} if content == {"total_bytes": 1} else content

    code, path = report(change)
    if content == {"total_bytes": 1}:
        assert code == 1
        assert "report.json: the report must have the key" in capsys.readouterr().err
    else:  # another program's: made anew
        assert code == 0
        check_summary(json.loads((path / "report.json").read_text()), path)


def test_card_of_a_damaged_report_names_it(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "saved")
    (tmp_path / "saved" / "report.json").write_bytes(b"\xff\xfe{")
    assert main(["card", str(tmp_path / "saved")]) == 1
    assert "report.json is damaged: it is no JSON" in capsys.readouterr().err


def test_names_and_strings_are_text_on_card_and_page(summary):
    markdown_it = pytest.importorskip("markdown_it")
    evil = copy.deepcopy(summary)
    evil["device"] = evil["record"]["calibration"] = evil["versions"]["torch"] = evil["created"] = EVIL
    evil["config"] |= {"calibration": EVIL, "fit": EVIL, "seed": EVIL, "refine_steps": EVIL}
    evil["base_model"] = f"owner/{EVIL}"
    evil["evaluation"]["data"] = EVIL
    evil["evaluation"]["model"]["metrics"] = {EVIL: 0.5}
    evil["evaluation"]["model"]["speed"]["device"] = EVIL
    evil["evaluation"]["examples"][0] |= {
        "question": EVIL,
        "accepted": [EVIL],
        "given": EVIL,
        "given_by_original": EVIL,
    }
    evil["tasks"]["harness"] = EVIL
    evil["tasks"]["scores"][0] |= {"task": EVIL, "dataset": EVIL, "metric": EVIL}
    evil["modules"][0]["name"] = f"model.layers.0.{EVIL}"
    card = str(model_card(evil, f'me/{EVIL}"); import os', None, tuple(plots(evil))))
    body = card.split("---\n", 2)[2]
    tokens = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse(body)
    flat = [inner for token in tokens for inner in (token, *(token.children or ()))]
    assert not [token for token in flat if token.type.startswith("html")]
    links = {token.attrGet("href") or token.attrGet("src") for token in flat if token.type in ("link_open", "image")}
    assert all(link.startswith(("plots/", "https://arxiv.org/")) for link in links)
    assert sum(token.type == "heading_open" for token in tokens) == 6
    assert sum(token.type == "table_open" for token in tokens) == 4
    assert ModelCard(card).data.eval_results[0].dataset_type == EVIL
    code = next(token.content for token in tokens if token.type == "fence")
    compile(code, "card", "exec")
    assert len(code.strip().splitlines()) == 5

    class Tags(HTMLParser):
        found: set[str] = set()  # noqa: RUF012
        sources: set[str] = set()  # noqa: RUF012

        def handle_starttag(self, tag, attributes):
            self.found |= {tag, *(f"on:{name}" for name, _ in attributes if name.startswith("on"))}
            self.sources |= {value for name, value in attributes if name in ("src", "href")}

    for page in (html_report(evil, EVIL), *plots(evil).values()):
        Tags().feed(page)
    assert not {tag for tag in Tags.found if tag in ("script", "a") or tag.startswith("on:")}
    assert Tags.sources == {f"data:image/png;base64,{png_base64((9, 9, 9))}"}


@pytest.mark.parametrize("content", [b"<svg onload='alert(1)'/>", b"GIF89a", b""])
def test_pictures_of_other_formats_are_refused(content):
    with pytest.raises(ValueError, match=r"must be one of \['png', 'jpeg'\]"):
        picture_format(base64.b64encode(content).decode())


def test_text_and_code_of_markdown():
    assert as_text("a | b\n# c <b> *d* [e](f)") == r"a \| b # c &lt;b&gt; \*d\* \[e\](f)"
    assert as_code("plain") == "`plain`"
    assert as_code("a `` b\nc") == "``` a `` b c ```"
    assert as_text("26.3 %, 512 samples (text)") == "26.3 %, 512 samples (text)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "it is no JSON"),
        ("[]", "the evaluation must be an object"),
        ('{"data": "x", "seed": 1, "num_samples": 9, "model": 5}', r"the evaluation\.model must be an object, got 5"),
        (
            '{"data": "x", "seed": 1, "num_samples": 9, "model": {"metrics": {"a": "b"}, "nll": 1}}',
            r"metrics\.a must be a number",
        ),
    ],
)
def test_an_evaluation_of_another_form_names_file_and_place(tmp_path, content, message):
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(ValueError, match=rf"eval\.json.*{message}.*`sab-hf eval --output` wrote"):
        read_evaluation(tmp_path / "eval.json")


@pytest.mark.parametrize("head", ["- a\n- b", "5", "license: [a, b]", "license: {a: b}", "license: 5", "a: &a [*a]"])
def test_license_of_a_card_of_another_form(tmp_path, head):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
    assert not isinstance(find_license(str(tmp_path)), (dict, int))


# ---- the terminal


def test_control_characters_are_written_as_escapes():
    assert printable("a\x1b[2Jb\r\x07\x9b\u202ec\n\td é 中 👍") == "a\\x1b[2Jb\\r\\x07\\x9b\\u202ec\n\td é 中 👍"


def test_names_of_tensors_do_not_reach_the_terminal_as_they_are(damage, capsys):
    def change(tensors):
        tensors["language_model.model.layers.0.\x1b[2Jmlp.signs"] = tensors.pop(
            "language_model.model.layers.0.mlp.down_proj.signs"
        )

    assert main(["inspect", str(damage(tensors=change))]) == 1
    captured = capsys.readouterr()
    assert "\x1b" not in captured.err + captured.out
    assert main(["inspect", "no\x1b]0;such\x07folder/"]) == 1
    captured = capsys.readouterr()
    assert "\\x1b]0;such\\x07folder" in captured.err
    assert not {"\x1b", "\x07"} & set(captured.err)


@pytest.mark.parametrize(
    "config",
    [
        [], 5, "text", {}, {"model_type": 5}, {"model_type": "llava"}, {"architectures": 5}, {"architectures": [5]},
        {"architectures": ["LlamaConfig"]}, {"quantization_config": 5}, {"quantization_config": ["sab"]}, {"text_config": 5},
        {"text_config": {"hidden_size": "wide"}}, {"text_config": {"num_hidden_layers": [2]}},
        {"vision_config": {"patch_size": 0}},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("command", ["inspect", "dequantize"])
def test_a_config_of_another_form_is_an_error_without_a_traceback(packed_dir, tmp_path, capsys, config, command):
    shutil.copytree(packed_dir, tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    content = json.loads(file.read_text())
    if isinstance(config, dict):
        content["quantization_config"]["checksums"] = None
        for key, value in config.items():
            content[key] = content[key] | value if isinstance(value, dict) else value
        config = content if config else {}
    file.write_text(json.dumps(config))
    out = [tmp_path / "out"] if command == "dequantize" else []
    code = main([command, str(tmp_path / "saved"), *map(str, out)])
    captured = capsys.readouterr()
    if code == 0:  # what was changed is of no use to this command
        return
    assert captured.err.rpartition(f"sab-hf {command}: error: ")[2].strip()
    assert not (tmp_path / "out").exists()
