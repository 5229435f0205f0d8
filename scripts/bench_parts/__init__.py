"""What scripts/bench is made of: models, processes, measuring, figures, the page."""
