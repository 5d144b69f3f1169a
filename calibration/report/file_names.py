"""The names of a report's files beside the weights, for those who look for one without torch."""

REPORT = "quantization_report.json"
PAGE = "quantization_report.html"
