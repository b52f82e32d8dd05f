"""Numbers to people: files, the terminal table, figures."""
