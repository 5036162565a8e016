"""Training of NextFlow: the trainers, their data, the Shapes world and the evaluations. Import the sub-packages."""
