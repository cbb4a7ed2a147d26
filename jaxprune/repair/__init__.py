"""What a pruning costs and how it is mended: predicted and true loss, selecting again, least squares."""
