"""What all trainings share: recipes, checkpoints, processes, refusals."""
