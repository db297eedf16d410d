"""Why a run does not learn, fell or is slow: findings from its folder, each with evidence and a cure."""
