"""How close a student is to its teacher. Names of files of evaluations and leaderboards."""

METRICS = "metrics.json"
PER_DOCUMENT = "per_document.jsonl"
REPORT = "report.html"
SUMMARY = "summary.md"  # the report in short, for the UI of Kubeflow Pipelines
LINEAGE = "lineage.html"
REPORT_DATA = "report.json"  # what the page is made of
LEADERBOARD = "leaderboard.json"
TABLE = "leaderboard.csv"
GATE = "gate.json"  # of a `promotion` artifact
GATE_TABLE = "gate.md"
SEARCH = "search.json"  # of a `search` artifact
