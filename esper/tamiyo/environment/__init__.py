"""Real small trainings as episodes: hosts by family, growth at decision points, rollouts in many processes."""
