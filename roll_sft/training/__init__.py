"""The driver: time, saves, records, console."""
