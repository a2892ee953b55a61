"""The demo's pairs; its model where no hub is in reach."""
