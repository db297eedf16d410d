"""Two or more evaluations against each other: what differs, how surely, and on which items. Reads folders only."""
