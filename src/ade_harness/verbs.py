"""The words that a command may begin with."""

REPORTS = {
    "status": ("report.status", "run_status"),
    "report": ("report.commands", "run_report"),
    "submit": ("leaderboard.submit", "run_submit"),
    "reproduce": ("leaderboard.reproduce", "run_reproduce"),
    "leaderboard": ("leaderboard.table", "run_leaderboard"),
    "data": ("data_cli", "run_data"),
    "serve": ("serve", "run_serve"),
    "doctor": ("doctor", "run_doctor"),
}
"""Verbs that take a console and words: module and function, imported when they are asked for."""
VERBS = ("evaluate", "resume", "probe", "compare", "models", *REPORTS)
