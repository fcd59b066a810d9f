"""The report of a run: one HTML page of its curves, samples, configuration and end."""

STARTS, REPORT, PACKS = "starts.jsonl", "report.html", "job/packs.json"  # files of a run
RESTARTS, STRAGGLERS = "restarts.jsonl", "stragglers.jsonl"
