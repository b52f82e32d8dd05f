"""The run directory: its ledger of per-image counts, and the record of what was run."""
