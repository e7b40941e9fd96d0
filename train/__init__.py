"""The algorithm: rollouts, losses, teachers, optimisation, checkpoints and their entry points."""
