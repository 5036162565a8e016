"""Training of NextFlow: the trainers, their data, rewards and evaluations. Import the sub-packages."""
