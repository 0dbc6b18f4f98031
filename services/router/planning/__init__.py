"""What planners work with: traffic seen as topics, engines as they are, moves within budgets."""
