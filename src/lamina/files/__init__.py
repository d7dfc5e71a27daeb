"""Files that others may have written: read without running code, written whole or not at all."""
