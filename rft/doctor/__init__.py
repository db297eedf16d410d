"""Why a run does not learn, fell or is slow: findings from its folder, each with evidence and a cure."""

from rft.doctor.diagnosis import diagnose

__all__ = ["diagnose"]
