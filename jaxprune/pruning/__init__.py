"""The units that stay, and the repair of what is left: budgets, selection, rounds, recovery, checks, the record."""
