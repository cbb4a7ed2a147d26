"""A model's answers, and how good they are."""
