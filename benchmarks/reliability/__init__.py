"""What the server does when it is overloaded, disturbed, told to leave, or sent nonsense; see docs/reliability.md."""
