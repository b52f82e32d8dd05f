"""One evaluation, from configuration to result."""
