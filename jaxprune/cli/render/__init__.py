"""Tables, model cards and pictures."""
