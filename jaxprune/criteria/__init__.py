"""What a criterion is made of: objectives, paths and nodes, activations, sums over examples; and the baselines."""
