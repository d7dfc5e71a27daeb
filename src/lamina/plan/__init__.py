"""The plan: what a user wants, as frozen values that are checked where they are written."""
