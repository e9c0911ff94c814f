"""What ends, repairs or explains a run that goes wrong."""
