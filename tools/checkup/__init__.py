"""What tools/doctor.py looks at, one file per subject. Nothing of torch is imported before it has been found sound."""
