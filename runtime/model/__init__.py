"""The decoder of every architecture that is served, and what reads its weights."""
