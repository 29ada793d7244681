"""How close a student is to its teacher. The names are those of an evaluation's files."""

METRICS = "metrics.json"
PER_DOCUMENT = "per_document.jsonl"
REPORT = "report.html"
