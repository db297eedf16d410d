"""What the page tries out in a process of its own: a grader on stored rollouts, a dataset.

process.py starts `python -m rft.ui.tries STORY` with a deadline and bounds on its memory; what the story needs of the
server (judges) it asks for over its pipes, so that it holds no keys. A stuck or huge try ends with its process.
"""
