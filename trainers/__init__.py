"""The trainer: objective, batches, policy, weight sync, checkpoints, and the loop that uses them (grpo.py)."""

if __name__ != "rft.trainers":
    raise ImportError("this folder is the package rft.trainers: `import rft.trainers`, not `import trainers`")
