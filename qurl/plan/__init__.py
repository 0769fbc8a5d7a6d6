"""A run on paper: batches, memory, placement and wire bytes, without starting anything."""

from qurl.plan.batch import BatchPlan
from qurl.plan.memory import EngineMemory, LearnerMemory
from qurl.plan.model_facts import ModelFacts
from qurl.plan.run_plan import RunPlan, make_plan

__all__ = ["BatchPlan", "EngineMemory", "LearnerMemory", "ModelFacts", "RunPlan", "make_plan"]
