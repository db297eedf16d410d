"""A run folder in the words of the wire: metrics events, checkpoints, result files, usage. Pure functions."""
