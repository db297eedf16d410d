"""Runs on a Slurm cluster: one allocation, one task per node; the first nodes train, the last ones may sample.

Guarantees: what is wrong with the nodes is said before anything is loaded; a run that Slurm ends early goes on in its
next attempt after its last complete step. All that nodes tell each other are files in the run folder, `RUN/slurm`.
"""
