"""Problems from files: what is understood, and what is refused with which words."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qurl.config import DatasetConfig
from qurl.data import load_rows

KEY = "data.train"
ROW = {"problem": "1+1?", "answer": "2"}


def load(path, **options):
    return load_rows(DatasetConfig(path=str(path), **options), KEY)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def refused(path, *words, **options):
    with pytest.raises(ValueError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in (KEY, *words):
        assert word in message, message


def test_the_three_file_formats_give_the_same_problems(tmp_path):
    rows = [{"problem": f"{i}+1?", "answer": str(i + 1), "level": i} for i in range(3)]
    jsonl = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    plain = write(tmp_path / "a.json", json.dumps(rows))
    wrapped = write(tmp_path / "sub.json", json.dumps({"data": rows}))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    loaded = [load(path, data_source="x") for path in (jsonl, plain, wrapped, tmp_path / "a.parquet")]
    for problems in loaded:
        assert [(p.row, p.text, p.answer, p.extra, p.data_source) for p in problems] == [
            (i, f"{i}+1?", str(i + 1), {"level": i}, "x") for i in range(3)
        ]


def test_byte_order_mark_crlf_and_blank_lines_are_read_as_if_absent(tmp_path):
    line = json.dumps(ROW).encode()
    path = write(tmp_path / "windows.jsonl", b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n")
    assert [(p.row, p.place) for p in load(path)] == [(0, "line 1"), (1, "line 3")]
    assert len(load(write(tmp_path / "windows.json", b"\xef\xbb\xbf[\r\n" + line + b"]"))) == 1


def test_a_line_separator_inside_text_does_not_end_a_row(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"problem": "a\u2028b\x85c", "answer": "1"}, ensure_ascii=False))
    assert load(path)[0].text == "a\u2028b\x85c"


def test_verl_rows_are_recognized_without_configuration(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    row = {"data_source": "math_dapo", "prompt": chat, "ability": "MATH", "extra_info": {"index": 7, "split": "train"},
           "reward_model": {"style": "rule", "ground_truth": "2"}}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "dapo.parquet")
    (problem,) = load(tmp_path / "dapo.parquet")
    assert (problem.messages, problem.text, problem.answer) == (chat, "1+1?", "2")
    assert problem.data_source == "math_dapo"
    assert problem.extra == {"ability": "MATH", "index": 7, "split": "train"}


def test_gsm8k_rows_keep_the_whole_worked_answer_as_ground_truth(tmp_path):
    path = write(tmp_path / "gsm8k.jsonl", json.dumps({"question": "6*7?", "answer": "6*7=42\n#### 42"}))
    (problem,) = load(path, prompt_key="question", answer_key="answer")
    assert problem.answer == "6*7=42\n#### 42"
    assert problem.data_source == "gsm8k"


@pytest.mark.parametrize(
    ("answer", "text"), [(142.0, "142.0"), (7, "7"), (["2"], "['2']"), ([1, 2], "['1', '2']"), (0, "0"), (" 5 ", " 5 ")]
)
def test_answers_that_are_not_text_become_text(tmp_path, answer, text):
    assert load(write(tmp_path / "a.json", json.dumps([{"problem": "p", "answer": answer}])))[0].answer == text


@pytest.mark.parametrize("answer", [None, "", "  ", float("nan"), [], [None]])
def test_rows_without_an_answer_are_named(tmp_path, answer):
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, [ROW, {"problem": "p", "answer": answer}, ROW])))
    refused(path, "line 2", "1 of 3 rows", "answer_key='answer'")


def test_max_rows_keeps_the_first_rows_and_reads_no_further(tmp_path):
    path = write(tmp_path / "a.jsonl", f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n{{broken")
    assert len(load(path, max_rows=2)) == 2
    refused(path, "max_rows=0", max_rows=0)


def test_unique_keeps_the_first_of_rows_with_the_same_problem_and_answer(tmp_path):
    rows = [{"problem": text, "answer": answer, "id": i} for i, (text, answer) in enumerate(["p1", "q1", "p1", "p2", "q1"])]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert [(problem.row, problem.extra["id"]) for problem in load(path, unique=True)] == [(0, 0), (1, 1), (3, 3)]
    assert [problem.row for problem in load(path, unique=True, max_rows=2)] == [0, 1]
    assert len(load(path)) == 5


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"problem": "p", "answer": "1"}\n{"problem": "p", ', ["line 2", "not JSON"]),
        ("a.jsonl", '{"question": "p", "answer": "1"}', ["prompt_key='problem'", "line 1", "found question, answer"]),
        ("a.jsonl", '{"problem": "p", "solution": "1"}', ["answer_key='answer'", "line 1", "found problem, solution"]),
        ("a.jsonl", "", ["holds no rows"]),
        ("a.jsonl", "\n\n", ["holds no rows"]),
        ("a.jsonl", "[1, 2]", ["line 1", "list"]),
        ("a.jsonl", '{"problem": 5, "answer": "1"}', ["line 1", "prompt_key", "int"]),
        ("a.jsonl", '{"problem": " ", "answer": "1"}', ["line 1", "empty"]),
        ("a.jsonl", '{"problem": "p", "answer": {"x": 1}}', ["line 1", "answer_key", "{'x': 1}"]),
        ("a.jsonl", '{"problem": "p", "answer": [["1", "2"]]}', ["line 1", "answer_key", "[['1', '2']]"]),
        ("a.jsonl", '{"problem": "p", "answer": Infinity}', ["line 1", "answer_key", "inf"]),
        ("a.jsonl", '[\n{"problem": "p", "answer": "1"}\n]', ["line 1", "belongs in a .json file"]),
        ("a.jsonl", b'{"problem": "p", "answer": "1"}\n\0\0\0\0', ["line 2", "NUL"]),
        ("a.jsonl", b'{"problem": "\xff", "answer": "1"}', ["line 1", "UTF-8"]),
        ("a.jsonl", '{"problem": "\\ud800", "answer": "1"}', ["line 1", "surrogate"]),
        ("a.jsonl", '{"problem": "p", "answer": ' + "9" * 5000 + "}", ["line 1"]),
        ("a.jsonl", "[" * 100_000, ["line 1"]),
        ("a.jsonl", '{"problem": [{"role": "user"}], "answer": "1"}', ["line 1", "content"]),
        ("a.jsonl", '{"problem": [{"role": "assistant", "content": "x"}], "answer": "1"}', ["line 1", "user turn"]),
        ("a.json", '{"rows": []}', ["found an object with keys rows"]),
        ("a.json", "3", ["found a int"]),
        ("a.json", "[]", ["holds no rows"]),
        ("a.json", "", ["holds no rows"]),
        ("a.json", '[{"problem": "p"},\n 5 6]', ["line 2", "not JSON"]),
        ("a.json", '{"problem": "p"}\n{"problem": "q"}', ["line 2", ".jsonl"]),
        ("a.json", '[{"problem": "p", "answer": "1"}, {"problem": "p"}]', ["row 1 counting from 0", "answer_key"]),
        ("a.parquet", "not parquet", ["parquet"]),
        ("a.csv", "problem,answer", ["'.csv' is not supported", ".jsonl"]),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_with_place_and_key(tmp_path, name, content, words):
    refused(write(tmp_path / name, content), name, *words)


def test_paths_that_are_not_files_are_refused(tmp_path):
    refused(tmp_path / "gone.jsonl", "no such file")
    refused("gone.jsonl", "no such file", "current folder")
    refused(tmp_path, "is a folder")
    (tmp_path / "folder.json").mkdir()
    refused(tmp_path / "folder.json", "is a folder")
    refused("", "is empty")
    refused("a\0.json", "NUL")


def test_a_hub_dataset_that_cannot_be_reached_is_one_clear_line(monkeypatch):
    import datasets

    def unreachable(path, name, split):
        assert (path, name, split) == ("openai/gsm8k", "main", "test")
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    refused("openai/gsm8k", "openai/gsm8k", "split=test", "Couldn't reach the Hub", name="main", split="test")


def test_a_hub_dataset_gives_rows_and_its_name_as_source(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([ROW, ROW]))
    problems = load("someone/problems-v1.5")
    assert [(p.text, p.answer, p.data_source) for p in problems] == [("1+1?", "2", "someone/problems-v1.5")] * 2
