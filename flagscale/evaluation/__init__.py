"""How close a student is to its teacher. Names of files of evaluations and leaderboards."""

METRICS = "metrics.json"
PER_DOCUMENT = "per_document.jsonl"
REPORT = "report.html"
SUMMARY = "summary.md"  # for a pipeline's UI
REPORT_DATA = "report.json"  # what the page is made of
LEADERBOARD = "leaderboard.json"
TABLE = "leaderboard.csv"
SEARCH = "search.json"  # of a `search` artifact
