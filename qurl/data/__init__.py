"""Problems from files or the hub, the prompts made of them, and the endless stream a run draws from."""

from qurl.data.problems import Problem, load_rows
from qurl.data.prompts import PromptSet, build_prompts
from qurl.data.stream import PromptStream

__all__ = ["Problem", "PromptSet", "PromptStream", "build_prompts", "load_rows"]
