"""What a run exports."""
