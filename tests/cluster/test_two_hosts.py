"""A run whose two ranks are on two hosts: refused where they do not share the run folder or the model, else with all shards."""

import json
import sys
from pathlib import Path

import pytest
from hosts import ADDRESSES, Hosts, missing_permission

from qurl.warmstart.model import make_tiny_model

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(reason := missing_permission()), reason=f"namespaces cannot be made here: {reason}"),
]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    shared = tmp_path_factory.mktemp("shared")
    make_tiny_model(shared / "tiny", seed=0)
    rows = [{"problem": f"{a}+{a}=", "answer": str(2 * a)} for a in range(10)]
    (shared / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (shared / "reward.py").write_text("def score(response, ground_truth):\n    return float(sum(map(ord, response)) % 2)\n")
    with Hosts(shared) as made:
        made.start_ray()
        yield made


def train(hosts, *overrides):
    """On host a, from a folder where no relative path leads anywhere on host b."""
    return hosts.run(
        "a", sys.executable, str(HERE / "spread_train.py"), "run_name=r", "model.path=/mnt/shared/tiny",
        "data.train.path=/mnt/shared/sums.jsonl", "reward.function=/mnt/shared/reward.py:score", "reward.unpayable=keep",
        "data.max_prompt_tokens=16", "rollout.max_response_tokens=8", "rollout.num_prompts_per_step=2",
        "rollout.num_samples_per_prompt=2", "learner.num_ranks=2", "cluster.device=cpu", "num_steps=1",
        f"cluster.address={ADDRESSES['a']}:6379", *overrides, check=False, timeout=200,
    )  # fmt: skip


def test_a_run_folder_that_a_rank_on_another_host_does_not_see_is_refused_by_name(hosts):
    done = train(hosts, "output_dir=runs")
    assert done.returncode == 2, done.stdout
    told = (
        f"error: output_dir=/mnt/own/runs: qurl-b ({ADDRESSES['b']}), where learner rank 1 runs, does not see the run folder "
        "/mnt/own/runs/r; use a folder that all nodes share, under the same path on each"
    )
    assert told in done.stdout.splitlines(), done.stdout
    assert not hosts.run("a", "ls", "/mnt/own").stdout.split()  # a refused command leaves nothing


def test_a_model_that_another_host_does_not_have_is_refused_by_name(hosts):
    hosts.run("a", "cp", "-r", "/mnt/shared/tiny", "/mnt/own/model")
    done = train(hosts, "output_dir=/mnt/shared/runs", "model.path=model")
    assert done.returncode == 2, done.stdout
    assert f"error: model.path=/mnt/own/model does not exist on qurl-b ({ADDRESSES['b']}), where " in done.stdout


def test_with_a_shared_folder_the_checkpoint_has_the_shards_of_both_hosts(hosts):
    done = train(hosts, "output_dir=/mnt/shared/runs", "run_name=whole", "learner.zero_stage=2")
    assert done.returncode == 0, done.stdout
    folder = "/mnt/shared/runs/whole/checkpoints/step_000001"
    state = json.loads(hosts.run("a", "cat", f"{folder}/trainer_state.json").stdout)
    assert {"random_rank0.pt", "random_rank1.pt"} <= state["files"].keys()
