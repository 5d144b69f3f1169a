"""Mixture of experts: which experts a token goes to, and its way through them and back."""
