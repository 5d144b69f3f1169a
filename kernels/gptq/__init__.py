"""Rounding weights onto a grid with calibration's second moments in view: GPTQ's recursion and the search of scales."""
