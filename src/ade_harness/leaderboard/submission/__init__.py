"""What the leaderboard asks of a submission, made and checked."""
