"""One training run: setup, loop state, guard, run folder."""
