"""What the untrained model does on a task, in numbers: whether training has anything to learn from, before it runs."""
