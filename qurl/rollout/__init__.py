"""The rollout pool: vLLM engines as Ray actors, dispatch by load, replacement of lost engines."""
