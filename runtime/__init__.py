"""Serves token ids: scheduling, the KV cache, the decoder, sampling. Never text, never HTTP, never calibration."""
