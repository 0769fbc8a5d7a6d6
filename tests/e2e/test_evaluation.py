"""`qurl eval` on a tiny model: killed half-way and started again, it gives what an unbroken one gives."""

import json
import signal
import time

import pytest

pytestmark = pytest.mark.e2e

OPTIONS = (
    "eval", "tiny", "--benchmarks", "gsm8k", "--data", "gsm8k=sums.jsonl", "--prompt", "plain", "--format", "int8",
    "--samples", "2", "--k", "1", "2", "--temperature", "1.0", "--max-tokens", "24", "--max-prompt-tokens", "16",
    "--engine-arg", "max_num_seqs=4",
)  # fmt: skip


def test_a_killed_evaluation_goes_on_to_the_results_of_an_unbroken_one(command_line):
    code, output = command_line.run(*OPTIONS, "--out", "unbroken")
    assert code == 0, output
    results = json.loads((command_line.folder / "unbroken" / "results.json").read_text())["gsm8k"]
    assert (results["num_problems"], results["num_samples"], results["error_count"]) == (40, 2, 0)
    assert set(results["pass_at_k"]) == {"1", "2"}
    assert results["pass_at_k"]["1"]["value"] == pytest.approx(results["avg_at_k"]["value"])
    assert "avg@k" in output and "pass@2" in output

    broken = command_line.folder / "broken" / "problems.jsonl"
    process = command_line.start(*OPTIONS, "--out", "broken")
    while not broken.exists() or broken.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = broken.read_bytes()
    assert done.count(b"\n") < 40, "the evaluation was over before it could be killed"
    code, output = command_line.run(*OPTIONS, "--out", "broken")
    assert code == 0, output
    assert broken.read_bytes().startswith(done[: done.rindex(b"\n") + 1]), "what was done is kept"
    for name in ("results.json", "config.json"):
        assert (broken.parent / name).read_text() == (command_line.folder / "unbroken" / name).read_text()
    responses = [{(r["problem"], *r["responses"]) for r in map(json.loads, path.read_text().splitlines())}
                 for path in (broken, command_line.folder / "unbroken" / "problems.jsonl")]  # fmt: skip
    assert responses[0] == responses[1] and len(responses[0]) == 40

    code, output = command_line.run(*OPTIONS, "--out", "broken", "--seed", "1")
    assert code == 2 and "seed=1: the evaluation in broken was started with 0" in output
