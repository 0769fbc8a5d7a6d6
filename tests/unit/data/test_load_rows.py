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
    ("answer", "text"),
    [
        *((142.0, "142"), (0.5, "0.5"), (1e22, "1" + 22 * "0"), (-0.0, "0"), (1e-7, "0.0000001"), (7, "7"), (0, "0")),
        *((True, "True"), (["2"], "2"), ([72.0], "72"), ([1, 2], "['1', '2']"), (" 5 ", " 5 ")),
    ],
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
        ("a.jsonl", '{"problem": "p", "answer": {}}', ["line 1", "answer_key", "no answer"]),
        ("a.jsonl", '{"problem": "p", "answer": "1", "answer": "2"}', ["line 1", "'answer' stands twice"]),
        ("a.jsonl", '{"problem": "p", "answer": "1"}'.encode("utf-16"), ["line 1", "UTF-16", "UTF-8"]),
        ("a.json", '[{"problem": "p", "answer": "1"}]'.encode("utf-16-le"), ["UTF-16", "UTF-8"]),
        ("a.jsonl.gz", "no gzip", ["compressed file is damaged"]),
        ("a.parquet.gz", "x", ["unpack it"]),
        ("a.arrow", "no arrow", ["not a readable Arrow file"]),
        ("a.csv", "problem,answer\n1+1?,2,3\n", ["line 2", "3 values for the 2 columns"]),
        ("a.csv", "problem,answer,answer\n1,2,3\n", ["'answer' stands there twice"]),
        ("a.csv", 'problem,answer\n"1+1', ["line 2", "not CSV"]),
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
        ("a.csv", "problem,answer", ["holds no rows"]),
        ("a.xlsx", "x", ["'.xlsx' is not supported", ".jsonl"]),
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


def test_lists_and_objects_reach_a_reward_as_they_are_stored(tmp_path):
    target = {"target": 3, "numbers": [1, 2]}
    chat = [{"role": "user", "content": "Make 3"}]
    rows = [{"prompt": chat, "reward_model": {"style": "rule", "ground_truth": it}} for it in (target, ["3", "III"], "3")]
    path = write(tmp_path / "a.json", json.dumps(rows))
    found = [(problem.answer, problem.truth) for problem in load(path)]
    text = '{"numbers": [1, 2], "target": 3}'
    assert found == [(text, target), ("['3', 'III']", ["3", "III"]), ("3", None)]
    rows[0]["reward_model"]["ground_truth"] = None
    refused(write(tmp_path / "b.json", json.dumps(rows[:1])), "no answer")


def test_a_chat_and_a_reward_model_may_be_json_text(tmp_path):
    chat = [{"role": "user", "content": "1+1?"}]
    row = {"prompt": json.dumps(chat), "reward_model": json.dumps({"ground_truth": 2}), "extra_info": json.dumps({"index": 5})}
    (problem,) = load(write(tmp_path / "a.json", json.dumps([row])))
    assert (problem.messages, problem.text, problem.answer, problem.extra) == (chat, "1+1?", "2", {"index": 5})
    (plain,) = load(write(tmp_path / "b.json", json.dumps([{"problem": json.dumps(chat), "answer": "2"}])))
    assert plain.messages == chat
    assert load(write(tmp_path / "c.json", json.dumps([{"problem": "[1, 2] has which sum?", "answer": "3"}])))[0].messages is None


def test_files_patterns_and_compressed_files_are_one_dataset(tmp_path):
    import bz2
    import gzip
    import lzma

    def lines(name):
        return json.dumps({"problem": name, "answer": "2"}).encode()

    write(tmp_path / "a.jsonl.gz", gzip.compress(lines("a")))
    write(tmp_path / "b.json.xz", lzma.compress(b"[" + lines("b") + b"]"))
    write(tmp_path / "c.jsonl.bz2", bz2.compress(lines("c")))
    write(tmp_path / "d.csv", "\ufeffproblem,answer\r\n\"d,\nd\",033\r\n\r\n")
    write(tmp_path / "e.tsv", "problem\tanswer\ne\t5\n")
    (tmp_path / "shards").mkdir()
    for number in (1, 0):
        pq.write_table(pa.Table.from_pylist([{"problem": f"s{number}", "answer": 1}]), tmp_path / "shards" / f"{number}.parquet")
    table = pa.table({"problem": pa.array(["f"]).dictionary_encode(), "answer": pa.array(["1"], pa.large_string())})
    for name, open_writer in (("f.arrow", pa.ipc.new_stream), ("g.feather", pa.ipc.new_file)):
        with open_writer(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    names = ["a.jsonl.gz", "b.json.xz", "c.jsonl.bz2", "d.csv", "e.tsv", "shards/*.parquet", "f.arrow", "g.feather"]
    problems = load_rows(DatasetConfig(path=[str(tmp_path / name) for name in names]), KEY)
    assert [problem.text for problem in problems] == ["a", "b", "c", "d,\nd", "e", "s0", "s1", "f", "f"]
    assert [problem.row for problem in problems] == list(range(9))
    assert (problems[3].answer, problems[0].data_source, problems[6].data_source) == ("033", "a", "1")
    assert problems[6].place == f"{tmp_path}/shards/1.parquet row 0 counting from 0"
    refused(tmp_path / "*.nothing", "no file matches the pattern")
    refused(tmp_path / "shards", "is a folder", "/*.parquet for all")


def test_rows_of_megabytes_leave_the_memory_and_come_back_as_they_were(tmp_path):
    import pickle
    import tracemalloc

    from qurl.data.spill import SpilledRow

    tests = [{"input": f"{i} " * 500, "output": "x" * 1000} for i in range(150)]
    row = {"prompt": [{"role": "user", "content": "p"}], "reward_model": {"ground_truth": "1"}, "extra_info": {"tests": tests}}
    schema = pa.Table.from_pylist([row]).schema
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for _ in range(10):
            writer.write_table(pa.Table.from_pylist([row] * 20, schema))  # 200 rows of 0.3 MB
    tracemalloc.start()
    problems = load(tmp_path / "a.parquet")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(problems) == 200
    assert held < 2 << 20
    assert peak < 40 << 20  # a batch of 32 rows; all rows are 70 MB
    extra = problems[7].extra
    assert isinstance(extra, SpilledRow)
    assert list(extra) == ["tests"]
    assert extra["tests"] == tests
    assert len(pickle.dumps(extra)) < 500
    assert pickle.loads(pickle.dumps(extra)) == {"tests": tests}
    with pytest.raises(KeyError):
        extra["none"]
