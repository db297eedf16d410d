"""Running jobs: the queue, one process per job, what its run folder tells, how it ends."""
