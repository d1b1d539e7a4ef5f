"""What tests share: models in every layout, runs, faults, jobs, and the references they are held against."""
