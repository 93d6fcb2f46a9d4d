"""The demo: graded preferences with known true margins, and a model small enough to learn them in two minutes."""
