"""What a preview shows: rows, tables, pictures, and the comparison after a run."""
