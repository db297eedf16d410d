"""Bridges: environments written for other libraries, as they are. One file per library, imported when used.

Each gives a rollout an instance of its own, runs what may block in a thread with a deadline, and turns what the
environment says into text for the model. The library itself is never needed to read a configuration.
"""
