"""The worth of each unit for a task: objectives, criteria, the run over a data set, score files."""
