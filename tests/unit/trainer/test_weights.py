"""How the pool changes between the configured quantization and guard's fallback, over fakes that write down what is asked."""

import asyncio
from dataclasses import replace

import pytest

from qurl.config import GuardAction, QuantizationConfig, SyncConfig
from qurl.trainer.guard import fallback
from qurl.trainer.weights import PublishedWeights

CONFIGURED = QuantizationConfig(format="axbxp", precision="k4-w1-a2", ignore=["down_proj"])


class Parts:
    """Learner and pool at once."""

    def __init__(self):
        self.events = []

    async def set_fallback(self, quantization):
        self.events.append(("learner", quantization))

    async def restart(self, start_actor):
        self.events.append(("restart", start_actor))

    async def set_precision(self, precision, start_actor):
        self.events.append(("set", precision, start_actor))


@pytest.mark.parametrize("action", [GuardAction.full_precision, GuardAction.raise_precision])
def test_engines_live_on_where_the_precision_alone_changes_and_successors_start_with_it(action):
    async def scenario():
        parts, other = Parts(), fallback(action, CONFIGURED)
        weights = PublishedWeights(SyncConfig(), parts, parts, lambda quantization: quantization, CONFIGURED, other)
        for fallen_back in (True, False):
            await weights.switch(fallen_back)
        if action is GuardAction.raise_precision:
            pool = [("set", "k4-w2-a2", replace(CONFIGURED, precision="k4-w2-a2")), ("set", "k4-w1-a2", CONFIGURED)]
        else:
            pool = [("restart", QuantizationConfig()), ("restart", CONFIGURED)]
        assert parts.events == [("learner", other), pool[0], ("learner", None), pool[1]]

    asyncio.run(scenario())
