"""What a trained model can do: the tasks of lm-eval by two routes (harness.py), CORE (core_tasks.py), and what its solve still adds, token
by token (internalization.py)."""
