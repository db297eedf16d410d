"""Asking for missing context: a question lacks something that a good answer needs, and the reply should ask for it.

One turn, no tools. The rows come from templates of minor health questions, from dialogues of BFCL, or from a
HealthBench file; scripts/prepare_asking writes them. `grader.py` is the text of the config's python grader.
"""
