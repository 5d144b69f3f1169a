"""The one look of octavo's reports: tables, charts and pages as values, and what HTML, Markdown and CSV make of them.

It knows no model and no measurement. Charts are drawn by Chart.js, which is in the page (vendor/).
"""
