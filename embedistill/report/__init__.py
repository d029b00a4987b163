"""What a comparison came to: report.json, a table for the terminal, a page for the browser."""
