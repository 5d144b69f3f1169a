"""What a million tokens costs: loads on a server, the highest rate within an SLO, prices, quality, and their report."""
