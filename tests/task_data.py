"""Small copies of the data sets of five public tasks, each with the files and columns of its repository."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Pictures

TEXT, TEXTS, NUMBER, PICTURE = Value("string"), Sequence(Value("string")), Value("int64"), Image()
NUM_ROWS = 4
TASKS = ("chartqa", "docvqa", "textvqa", "mmstar", "ocrbench")


def write(folder: Path) -> Path:
    """Write all five, each under its repository's id."""
    pictures = [Pictures.new("RGB", (24, 16), (40 * i, 90, 200)) for i in range(NUM_ROWS)]
    rows = range(NUM_ROWS)
    questions = [f"What is number {i}?" for i in rows]
    _write(
        folder / "lmms-lab-encoder/ChartQA/data/test-00000-of-00001.parquet",
        {"type": TEXT, "question": TEXT, "answer": TEXT, "image": PICTURE},
        {
            "type": ["human_test", "human_test", "augmented_test", "augmented_test"],
            "question": questions,
            "answer": ["10", "20.5", "blue", "30"],
            "image": pictures,
        },
    )
    doc = {"questionId": TEXT, "question": TEXT, "question_types": TEXTS, "image": PICTURE, "docId": NUMBER}
    doc |= {"ucsf_document_id": TEXT, "ucsf_document_page_no": TEXT, "answers": TEXTS, "data_split": TEXT}
    for split, answers in (("validation", [["a"], ["b", "B."], ["c"], ["d"]]), ("test", [None] * NUM_ROWS)):
        _write(
            folder / f"lmms-lab-encoder/DocVQA/DocVQA/{split}-00000-of-00001.parquet",
            doc,
            {
                "questionId": [str(i) for i in rows],
                "question": questions,
                "question_types": [["layout"]] * NUM_ROWS,
                "image": pictures,
                "docId": list(rows),
                "ucsf_document_id": ["x"] * NUM_ROWS,
                "ucsf_document_page_no": ["1"] * NUM_ROWS,
                "answers": answers,
                "data_split": [split] * NUM_ROWS,
            },
        )
    (folder / "lmms-lab-encoder/DocVQA/README.md").write_text(
        "---\nconfigs:\n- config_name: DocVQA\n  data_files:\n  - split: validation\n    path: DocVQA/validation-*\n"
        "  - split: test\n    path: DocVQA/test-*\n---\n"
    )
    scene = {"image_id": TEXT, "question_id": NUMBER, "question": TEXT, "question_tokens": TEXTS, "image": PICTURE}
    scene |= {"answers": TEXTS, "set_name": TEXT}
    for split in ("validation", "test"):
        _write(
            folder / f"lmms-lab-encoder/textvqa/data/{split}-00000-of-00001.parquet",
            scene,
            {
                "image_id": ["x"] * NUM_ROWS,
                "question_id": list(rows),
                "question": questions,
                "question_tokens": [["what"]] * NUM_ROWS,
                "image": pictures,
                "answers": [["one"] * 7 + ["two"] * 3] * NUM_ROWS,
                "set_name": [split] * NUM_ROWS,
            },
        )
    _write(
        folder / "Lin-Chen/MMStar/mmstar.parquet",
        {"index": NUMBER, "question": TEXT, "image": PICTURE, "answer": TEXT, "category": TEXT, "l2_category": TEXT},
        {
            "index": list(rows),
            "question": [f"{question}\nOptions: A: a, B: b, C: c, D: d" for question in questions],
            "image": pictures,
            "answer": ["A", "B", "C", "D"],
            "category": ["coarse perception", "math", "math", "science & technology"],
            "l2_category": ["image emotion", "geometry", "geometry", "biology & chemistry & physics"],
        },
    )
    (folder / "Lin-Chen/MMStar/README.md").write_text(
        "---\nconfigs:\n- config_name: val\n  data_files:\n  - split: val\n    path: mmstar.parquet\n---\n"
    )
    _write(
        folder / "echo840/OCRBench/data/test-00000-of-00001.parquet",
        {"dataset": TEXT, "question": TEXT, "question_type": TEXT, "answer": TEXTS, "image": PICTURE},
        {
            "dataset": ["IIIT5K", "HME100k", "docVQA", "FUNSD"],
            "question": questions,
            "question_type": [
                "Regular Text Recognition",
                "Handwritten Mathematical Expression Recognition",
                "Doc-oriented VQA",
                "Key Information Extraction",
            ],
            "answer": [["one"], ["two"], ["three", "3"], ["four"]],
            "image": pictures,
        },
    )
    return folder


def _write(path: Path, features: dict, columns: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, Features(features)).to_parquet(path)
