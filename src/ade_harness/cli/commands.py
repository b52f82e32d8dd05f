"""The words that a command may begin with."""

REPORTS = {
    "status": ("cli.status", "run_status"),
    "report": ("cli.report", "run_report"),
    "submit": ("cli.leaderboard", "run_submit"),
    "reproduce": ("cli.leaderboard", "run_reproduce"),
    "leaderboard": ("cli.leaderboard", "run_leaderboard"),
    "data": ("cli.data", "run_data"),
    "serve": ("cli.serve", "run_serve"),
    "doctor": ("cli.doctor", "run_doctor"),
}
"""Verbs that take a console and words: module and function, imported when they are asked for."""
VERBS = ("evaluate", "resume", "probe", "compare", "models", *REPORTS)
