"""Layers whose memory of a sequence is a state of fixed size: where states lie, and the gated delta rule."""
