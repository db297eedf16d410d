"""File planning: which files of a source tree must be edited for a change that is described in words?

The tools are those of the environment `shell`, over data/file_planning/trees. The graders' sources are grader.py (F1 of
file sets) and way.py; scripts/prepare_file_planning writes rows and trees.
"""
