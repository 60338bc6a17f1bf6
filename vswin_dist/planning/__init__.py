"""What a training needs, and whether it can run, before anything is started."""
