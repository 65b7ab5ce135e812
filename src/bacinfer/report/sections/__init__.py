"""The sections of a report, as plain data for the page. What is missing or damaged becomes a note in its place."""
