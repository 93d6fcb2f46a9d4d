"""The demo: graded preferences with known true margins, and a small model that learns them in two minutes."""
