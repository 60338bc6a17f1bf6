"""What all trainings below a storage root are doing, from storage and MLflow alone: `python -m vswin_dist.status`."""
