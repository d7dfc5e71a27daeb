"""What acts while a run goes on, beside the update itself."""
