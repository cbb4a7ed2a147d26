"""How far scores can be trusted: agreement of halves, where they came from, and checks against the truth."""
