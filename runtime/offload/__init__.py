"""The prefix cache's second level: blocks in a file, which outlive the engine."""
