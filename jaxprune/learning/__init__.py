"""What training is made of: the run that can be resumed, losses, curricula, and lessons of a teacher."""
