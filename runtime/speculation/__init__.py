"""Guesses of an answer's next tokens, out of texts that are there: who makes them, and how many of them pay."""
