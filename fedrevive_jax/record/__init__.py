"""The folder of a run: plain files, checkpoints, pictures, locks."""
