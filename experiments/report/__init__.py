"""All findings on one page."""
