"""First cell, panel, what cells show."""
