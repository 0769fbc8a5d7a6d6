"""Documents from files."""

import json

import pytest

from qurl.data.documents import load_documents


def test_columns_are_found_and_empty_ones_left_out(tmp_path):
    rows = [
        {"text": " plain "}, {"problem": "1+1?", "solution": "2", "answer": "2"}, {"question": "Why?", "answer": "Because."},
        {"problem": "1+2?", "answer": 3, "solution": None}, {"text": ""},
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_documents(str(path), "--text") == ["plain", "1+1?\n2", "Why?\nBecause.", "1+2?"]
    assert load_documents(str(path), "--text", 2) == ["plain", "1+1?\n2"]


def test_a_text_file_is_cut_at_blank_lines(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\nOne\nmore\n \n\nTwo\n")
    assert load_documents(str(path), "--text") == ["One\nmore", "Two"]


def test_what_holds_no_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "b.txt").write_text("\n \n")
    (tmp_path / "c.jsonl").write_text('{"text": " "}\n')
    cases = {
        "a.jsonl": "has the columns prompt; a document is text, or problem", "b.txt": "holds no text", "c.jsonl": "holds no text",
        "d.txt": "cannot be read",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            load_documents(str(tmp_path / name), "--text")
