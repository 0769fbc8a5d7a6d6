"""`qurl train` whose learner ranks are put on one node after the other. Ray puts actors without resources wherever it likes."""

import sys

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qurl.cli.main import main
from qurl.trainer.gpus import GpuReservation


def of_rank(self, rank):
    nodes = sorted((node["NodeManagerAddress"], node["NodeID"]) for node in ray.nodes())
    return NodeAffinitySchedulingStrategy(nodes[rank % len(nodes)][1], soft=False)


GpuReservation.of_rank = of_rank
if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
