"""How the ranks of one engine are told what to compute."""
