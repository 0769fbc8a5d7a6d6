"""A reward that a random model earns about half of the time, so that every group is informative."""


def score(response: str, ground_truth: str, **extra) -> float:
    return float(sum(map(ord, response)) % 2)
