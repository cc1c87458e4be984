"""Networks trained under one design, cell by cell, and what is measured in them."""
