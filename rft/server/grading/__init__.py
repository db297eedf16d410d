"""Graders and tools tried over the wire, and the models that judge."""
