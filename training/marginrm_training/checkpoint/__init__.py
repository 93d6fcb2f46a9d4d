"""The checkpoint of a run: export, golden samples, model card, calibration."""
