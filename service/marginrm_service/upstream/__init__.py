"""Models whose forward pass runs on another server: token ids go there, and raw rewards come back."""
