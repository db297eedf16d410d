"""Evals: the validation of every job as runs and items, and runs over data that clients bring."""
